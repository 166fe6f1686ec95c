/* The calls of the CUDA runtime that cannot merely succeed. Memory is this machine's, and copies
   copy; nothing computes, so what a kernel would write stays as it was. Counts what is asked of it,
   and remembers the names of kernels. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define TOTAL (80ull << 30)
#define OUT_OF_MEMORY 2
#define CAPTURE_UNSAFE 906

/* Copies on the card, copies from or to host memory, and CUDA graphs. */
size_t moves, moved_bytes, crossings, crossed_bytes, captures, launches, mallocs, frees;
static int last_error;
/* Threads that capture, whether this one does, and its mode: 0 minds others. */
static int all_capturing;
static __thread int capturing, mode;
/* What opaque handles point to. */
static char handle[64];

/* Memory: the card's is reserved as a whole and handed out from its beginning; what is freed is counted alone. */
static char *card;
static size_t allocated;
static int is_on_card(const void *address) {
  return card && (char *)address >= card && (char *)address < card + TOTAL;
}
static int copy(void *target, const void *source, size_t size) {
  if (is_on_card(target) && is_on_card(source)) {
    moves += 1;
    moved_bytes += size;
  } else {
    crossings += 1;
    crossed_bytes += size;
  }
  memcpy(target, source, size);
  return 0;
}
int cudaMalloc(void **address, size_t size) {
  if (capturing || (all_capturing && mode == 0)) return last_error = CAPTURE_UNSAFE;
  if (!card) card = mmap(0, TOTAL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (card == MAP_FAILED || size > TOTAL - allocated) return last_error = OUT_OF_MEMORY;
  *address = card + allocated;
  allocated += (size + 511) / 512 * 512;
  mallocs += 1;
  return 0;
}
int cudaFree(void *address) { frees += 1; return 0; }
int cudaMallocHost(void **address, size_t size) { return posix_memalign(address, 512, size ? size : 1); }
int cudaHostAlloc(void **address, size_t size, unsigned flags) { return cudaMallocHost(address, size); }
int cudaFreeHost(void *address) { free(address); return 0; }
int cudaMemcpy(void *target, const void *source, size_t size, int kind) { return copy(target, source, size); }
int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, void *stream) {
  return copy(target, source, size);
}
int cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
                      size_t rows, int kind, void *stream) {
  for (size_t row = 0; row < rows; row++)
    copy((char *)target + row * target_pitch, (const char *)source + row * source_pitch, width);
  return 0;
}
/* A kernel's variable: none has a value. */
int cudaMemcpyFromSymbol(void *target, const void *symbol, size_t size) { memset(target, 0, size); return 0; }
int cudaMemset(void *address, int value, size_t size) { memset(address, value, size); return 0; }
int cudaMemsetAsync(void *address, int value, size_t size, void *stream) { return cudaMemset(address, value, size); }
int cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  *free_bytes = TOTAL - allocated;
  *total_bytes = TOTAL;
  return 0;
}
int cudaPointerGetAttributes(int *attributes, const void *address) {
  memset(attributes, 0, 32);
  attributes[0] = is_on_card(address) ? 2 : 1;
  return 0;
}

/* One device of compute capability 9.0. Fields of cudaDeviceProp are where CUDA 13 has them. */
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;      /* threads of a block */
    case 8: *value = 49152; break;     /* shared memory of a block */
    case 10: *value = 32; break;       /* threads of a warp */
    case 16: *value = 132; break;      /* multiprocessors */
    case 38: *value = 50 << 20; break; /* L2 cache */
    case 39: *value = 2048; break;     /* threads of a multiprocessor */
    case 75: *value = 9; break;        /* compute capability, major */
    case 76: *value = 0; break;        /* and minor */
    case 81: *value = 233472; break;   /* shared memory of a multiprocessor */
    case 97: *value = 232448; break;   /* shared memory of a block, if asked for */
    default: *value = 1;
  }
  return 0;
}
int cudaGetDeviceProperties(char *properties, int device) {
  memset(properties, 0, 1008);
  strcpy(properties, "Stand-in");
  *(size_t *)(properties + 288) = TOTAL;
  *(size_t *)(properties + 296) = 49152; /* shared memory of a block */
  *(int *)(properties + 304) = 65536;    /* registers of a block */
  *(int *)(properties + 308) = 32;       /* threads of a warp */
  *(int *)(properties + 320) = 1024;     /* threads of a block */
  *(int *)(properties + 324) = 1024;     /* of each dimension */
  *(int *)(properties + 328) = 1024;
  *(int *)(properties + 332) = 64;
  *(int *)(properties + 360) = 9; /* compute capability */
  *(int *)(properties + 384) = 132; /* multiprocessors */
  *(int *)(properties + 604) = 2048;       /* threads of a multiprocessor */
  *(size_t *)(properties + 624) = 233472;  /* shared memory of a multiprocessor */
  *(size_t *)(properties + 672) = 232448;  /* and of a block, if asked for */
  return 0;
}

/* The last error, until somebody asks for it. */
int cudaGetLastError(void) { int error = last_error; last_error = 0; return error; }
int cudaPeekAtLastError(void) { return last_error; }

/* Streams, events and kernels. */
int cudaStreamCreate(void **stream) { *stream = handle; return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = handle; return 0; }
int cudaEventCreate(void **event) { *event = handle; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = handle; return 0; }
const char *cudaGetErrorString(int error) { return "an error of the stand-in"; }
const char *cudaGetErrorName(int error) { return "standIn"; }
void **__cudaRegisterFatBinary(void *binary) { return (void **)handle; }
int cudaFuncGetAttributes(int *attributes, const void *function) { memset(attributes, 0, 64); return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared,
                                                           unsigned flags) {
  *blocks = 2;
  return 0;
}

/* Kernels by name, as compilers mangle them, each on a line. */
#define MOST_KERNELS 400000
static struct { const void *function; const char *name; } known[MOST_KERNELS];
static int known_count;
static char asked[1 << 24];
static size_t asked_length;
void __cudaRegisterFunction(void **binary, const void *function, char *device_function, const char *name) {
  if (known_count < MOST_KERNELS) {
    known[known_count].function = function;
    known[known_count++].name = name;
  }
}
static int launched(const void *function) {
  const char *name = "unknown";
  for (int i = 0; i < known_count; i++)
    if (known[i].function == function) name = known[i].name;
  if (asked_length + strlen(name) + 2 < sizeof asked) asked_length += sprintf(asked + asked_length, "%s\n", name);
  return 0;
}
/* Those since this was last called. */
const char *take_kernels(void) {
  asked[asked_length] = 0;
  asked_length = 0;
  return asked;
}
int cudaLaunchKernel(const void *function) { return launched(function); }
int cudaLaunchKernelExC(const void *config, const void *function) { return launched(function); }
int __cudaLaunchKernel(const void *function) { return launched(function); }
int __cudaGetKernel(const void **kernel, const void *function) { *kernel = function; return 0; }

/* Captured graphs. */
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
int cudaStreamBeginCapture(void *stream, int mode) { all_capturing += capturing = 1; captures += 1; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { all_capturing -= 1; capturing = 0; *graph = handle; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *other) { int before = mode; mode = *other; *other = before; return 0; }
int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) { *executable = handle; return 0; }
int cudaGraphLaunch(void *executable, void *stream) { launches += 1; return 0; }
