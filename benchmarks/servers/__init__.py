"""Real servers on this machine, for measurements and tests: each in a process of its own, reachable only from this machine.

`plain` starts redis-server, moto's S3 and `hub`, a Hub with one pack, which listen on loopback. `mooncake` starts a cluster,
whose servers listen on all interfaces whatever they are told, so it needs a network of its own (`own_network`).
"""

from benchmarks.servers.plain import (
    S3Server,
    Server,
    Unavailable,
    free_port,
    start_hub_server,
    start_redis_server,
    start_s3_server,
)

__all__ = [
    "S3Server",
    "Server",
    "Unavailable",
    "free_port",
    "start_hub_server",
    "start_redis_server",
    "start_s3_server",
]
