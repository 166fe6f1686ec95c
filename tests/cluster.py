"""A cluster of simulated nodes of two CPUs each: `python tests/cluster.py NODES` prints its address, and
keeps it until standard input ends.
"""

import sys

from ray.cluster_utils import Cluster

CPUS = 2

if __name__ == "__main__":
    node = {"num_cpus": CPUS, "include_dashboard": False, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(int(sys.argv[1]) - 1):
        cluster.add_node(num_cpus=CPUS, object_store_memory=200_000_000)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
