/* The calls of NVML that say how much of a card is free, on a machine of two cards. As in NVML, none of them says
   anything before it is initialized or after it is shut down. */

#include <stdio.h>
#include <string.h>

#define UNINITIALIZED 1
#define INVALID_ARGUMENT 2
#define NOT_FOUND 6
#define CARDS 2

static struct card { const char *name, *uuid; unsigned long long total, free; } cards[CARDS] = {
  {"Stand-in", "GPU-5a", 80ull << 30, 70ull << 30},
  {"Small stand-in", "GPU-5b", 24ull << 30, 20ull << 30},
};
/* How often it was initialized, less how often it was shut down. */
static int begun;

int nvmlInitWithFlags(unsigned flags) { begun += 1; return 0; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
  if (!begun) return UNINITIALIZED;
  begun -= 1;
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct card **card) {
  if (!begun) return UNINITIALIZED;
  if (index >= CARDS) return INVALID_ARGUMENT;
  *card = cards + index;
  return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, struct card **card) {
  if (!begun) return UNINITIALIZED;
  for (*card = cards; *card < cards + CARDS; *card += 1)
    if (!strcmp((*card)->uuid, uuid)) return 0;
  return NOT_FOUND;
}
int nvmlDeviceGetName(struct card *card, char *name, unsigned size) {
  if (!begun) return UNINITIALIZED;
  snprintf(name, size, "%s", card->name);
  return 0;
}
/* In all, free, taken. */
int nvmlDeviceGetMemoryInfo(struct card *card, unsigned long long *memory) {
  if (!begun) return UNINITIALIZED;
  memory[0] = card->total;
  memory[1] = card->free;
  memory[2] = card->total - card->free;
  return 0;
}
const char *nvmlErrorString(int error) { return "an error of the stand-in"; }
