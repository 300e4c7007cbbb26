"""`python -m benchmarks`, in a checkout."""

from benchmarks.command import bench_app

if __name__ == "__main__":
    bench_app(prog_name="python -m benchmarks")
