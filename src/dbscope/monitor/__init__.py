"""Who holds which connection, since when, from which line: of this process, at any moment; and of others, by a socket.

`snapshot.py` looks at this process, `server.py` answers others who ask, `client.py` asks them, and `activity.py` asks
PostgreSQL.
"""

from dbscope.monitor.server import serve, stop
from dbscope.monitor.snapshot import Holding, PoolState, holdings, pools

__all__ = ["Holding", "PoolState", "holdings", "pools", "serve", "stop"]
