"""A cluster of simulated nodes of two CPUs each: `python tests/cluster.py NODES [HEAD_CPUS]` prints its address,
and keeps it until standard input ends. There, a line `add CPUS` adds a node and prints the first letters of its ID, by
which `remove ID` ends it without a warning, as spot machines end.
"""

import sys

from ray.cluster_utils import Cluster

CPUS = 2
STORE = 200_000_000

if __name__ == "__main__":
    head_cpus = int(sys.argv[2]) if len(sys.argv) > 2 else CPUS
    head = {"num_cpus": head_cpus, "include_dashboard": False, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = {}
    for _ in range(int(sys.argv[1]) - 1):
        cluster.add_node(num_cpus=CPUS, object_store_memory=STORE)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for line in sys.stdin:
        command, argument = line.split()
        if command == "add":
            node = cluster.add_node(num_cpus=int(argument), object_store_memory=STORE)
            nodes[node.node_id[:8]] = node
            print(node.node_id[:8], flush=True)
        else:
            cluster.remove_node(nodes.pop(argument), allow_graceful=False)
    cluster.shutdown()
