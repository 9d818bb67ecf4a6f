"""The benchmark for a GPU runs on a CPU too, and says what it must."""

import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_gpu_benchmark_runs_every_stage(tmp_path):
    flags = ["--shape", "tiny", "--load", "fp32", "--steps", "2", "--new_tokens", "4"]
    done = subprocess.run(
        [sys.executable, str(TESTS / "bench_gpu.py"), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout.splitlines()[-1])
    assert [line["stage"] for line in out["stages"]] == ["stage1", "stage2", "stage3"]
    assert all(line["seconds"] > 0 and line["update"] > 0 and 0 < line["estimated"] < 1 for line in out["stages"])
    assert out["stages"][2]["rollout"] > 0 and out["stages"][2]["hours"] > 0
    speeds = out["generation"]["fp32"]
    assert set(speeds) == {"eager", "generate", "static"} and all(speed["tokens"] > 0 for speed in speeds.values())
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_the_true_shape_is_refused(tmp_path):
    code = "import torch; torch.cuda.is_available = lambda: False; import runpy, sys; sys.argv = sys.argv[1:]; "
    code += "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, str(TESTS / "bench_gpu.py")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("There is no GPU here.")
