"""Work on many rooms in several processes, kept room by room, so that stage 0 can resume.

A folder of data that is not complete has parts.json (the settings) and parts/<room>.json (the results so far); a complete one
has manifest.json instead.
"""

import json
import multiprocessing
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch
from tqdm import tqdm

import common
from support import runs


def prepare(root, config, settings):
    """Make the folder `root` ready for data made with `config` (a dict). Returns whether there is anything to do.

    A folder with complete data is kept, one with unfinished data is continued, one made with other settings is refused.
    """
    manifest, begun = root / "manifest.json", root / "parts.json"
    if settings.resume != "never":
        for path in (manifest, begun):
            if path.is_file():
                runs.refuse_others(root, json.loads(path.read_text()).get("config", {}), config, config)
        if manifest.is_file():
            drop_parts(root)
            common.print0(f"found complete data in {root}; --resume never makes it again")
            return False
    else:
        for name in ("manifest.json", *common.FILES.values(), "objects.jsonl"):  # first, because they refer to the pictures
            (root / name).unlink(missing_ok=True)
        for name in ("parts", "heldout", "scans", "images"):
            shutil.rmtree(root / name, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    runs.write_atomic(begun, json.dumps({"config": config}))
    return True


def process_rooms(function, jobs, root, workers, desc):
    """Run function(job) for every (name, job) in `workers` processes. Each result is kept as root/parts/<name>.json at once, so
    that a rerun skips it. Returns the results in the order of the jobs."""
    (root / "parts").mkdir(parents=True, exist_ok=True)
    paths = {name: root / "parts" / f"{name}.json" for name, _ in jobs}
    todo = [(paths[name], job) for name, job in jobs if not paths[name].is_file()]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, start_worker)
    try:
        futures = {pool.submit(function, job): path for path, job in todo}
        for future in tqdm(as_completed(futures), desc, total=len(jobs), initial=len(jobs) - len(todo)):
            runs.write_atomic(futures.pop(future), json.dumps(future.result()))
    except BrokenProcessPool:
        message = "\na worker was killed. If memory ran out, lower --workers. Rerun the same command to resume."
        raise SystemExit(message) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return [json.loads(path.read_text()) for path in paths.values()]


def start_worker():
    """Only the parent handles signals: it ends its workers. If the parent is killed, they end, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    runs.end_with_parent()
    torch.set_num_threads(1)


def finish(root, manifest):
    """Write the manifest (a dict): the data is complete."""
    runs.write_atomic(root / "manifest.json", json.dumps(manifest, indent=2))
    drop_parts(root)


def drop_parts(root):
    """Delete the results that were kept for a resume."""
    for folder in (root, root / "heldout"):
        shutil.rmtree(folder / "parts", ignore_errors=True)
    (root / "parts.json").unlink(missing_ok=True)
