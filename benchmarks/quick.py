import sys, fnmatch
from contextlib import ExitStack
from benchmarks import measure, rows
measure.pin()
with ExitStack() as st:
    server = rows.Server(st)
    for row, place in rows.rows(server):
        if len(sys.argv)>2 and not any(p in row.name for p in sys.argv[2:]): continue
        try:
            with place() as names:
                rs = measure.measure(row, int(sys.argv[1]), names, lambda n: None)
        except measure.Missing as e:
            print(row.name, e); continue
        print(f"{row.name:50} target {row.target}")
        for r in rs:
            q=r.quartiles
            import statistics
            print(f"    {r.contender.name:35} {r.median:6.3f} [{min(r.ratios):.3f} {q[0]:.3f} {q[1]:.3f}] {statistics.median(r.seconds)*1e6:9.3f} us")
