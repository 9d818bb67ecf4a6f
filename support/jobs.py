"""Work on many rooms in several processes, kept room by room, so that stage 0 can resume.

A folder of data that is not complete has parts.json (the settings) and parts/<room>.json (the results so far); a complete one
has manifest.json instead. Each part has the fingerprint of what it was made from, and is made again if that has changed.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

import common
from support import files, runs


def file_facts(path):
    """(size, time of the last change) of a file."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def fingerprint(*inputs):
    """A digest of values and files. A Path counts by the file's contents, or by the names, sizes and times of all files in the
    folder; anything else by its repr."""
    digest = hashlib.sha256()
    for item in inputs:
        if isinstance(item, Path) and item.is_dir():
            found = sorted(os.path.join(place, name) for place, _, names in os.walk(item, followlinks=True) for name in names)
            item = [(os.path.relpath(path, item), file_facts(path) if os.path.exists(path) else None) for path in found]
        elif isinstance(item, Path):
            item = item.read_bytes()
        digest.update(repr(item).encode())
    return digest.hexdigest()


def prepare(root, config, settings, made_from):
    """Make the folder `root` ready for data made with `config` (a dict). Returns whether there is anything to do.

    A folder with complete data is kept, one with unfinished data is continued, one made with other settings is refused. A setting
    that the folder does not know had its default. made_from: the fingerprint of all inputs; complete data from others is
    kept, too, but with a note.
    """
    manifest, begun = root / "manifest.json", root / "parts.json"
    if settings.resume != "never":
        defaults = {part.name: part.default for part in fields(settings)}
        for path in (manifest, begun):
            if path.is_file():
                runs.refuse_others(root, defaults | json.loads(path.read_text(encoding="utf-8")).get("config", {}), config, config)
        if manifest.is_file():
            drop_parts(root)
            facts = json.loads(manifest.read_text(encoding="utf-8"))
            left_out = len(facts.get("failed_rooms", []))
            note = f", without {left_out} rooms that failed" if left_out else ""
            note += "" if facts.get("made_from", made_from) == made_from else " (the code or the input files have changed since)"
            common.print0(f"found complete data in {root}{note}; --resume never makes it again")
            return False
    else:
        for name in ("manifest.json", *common.FILES.values(), "objects.jsonl"):  # first, because they refer to the pictures
            (root / name).unlink(missing_ok=True)
        for name in ("parts", "heldout", "scans", "images"):
            shutil.rmtree(root / name, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    files.write_atomic(begun, json.dumps({"config": config}))
    return True


def read_part(path, made_from):
    """The result in a part, or None if it is missing, has another fingerprint, or says that its room failed."""
    part = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return part["result"] if part.get("made_from") == made_from and "failed" not in part["result"] else None


def process_rooms(function, jobs, root, workers, desc):
    """Run function(job) -> dict for every (name, fingerprint of its inputs, job) in `workers` processes. Each result is kept as
    root/parts/<name>.json at once, so that a rerun with the same inputs skips it, unless it has the key "failed". Returns
    the results in the order of the jobs."""
    (root / "parts").mkdir(parents=True, exist_ok=True)
    paths = {name: root / "parts" / f"{name}.json" for name, _, _ in jobs}
    todo = [(name, made_from, job) for name, made_from, job in jobs if read_part(paths[name], made_from) is None]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    most = 61 if sys.platform == "win32" else workers  # that Windows can wait for
    pool = ProcessPoolExecutor(min(workers, most), context, start_worker)
    try:
        futures = {pool.submit(function, job): (paths[name], made_from) for name, made_from, job in todo}
        for future in tqdm(as_completed(futures), desc, total=len(jobs), initial=len(jobs) - len(todo)):
            path, made_from = futures.pop(future)
            files.write_atomic(path, json.dumps({"made_from": made_from, "result": future.result()}))
    except BrokenProcessPool:
        message = "\na worker was killed. If memory ran out, lower --workers. Rerun the same command to resume."
        raise SystemExit(message) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return [json.loads(path.read_text(encoding="utf-8"))["result"] for path in paths.values()]


def start_worker():
    """Only the parent handles signals: it ends its workers. If the parent is killed, they end, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    runs.end_with_parent()
    torch.set_num_threads(1)


def sum_counts(counters):
    """The sum of dicts of numbers, by name."""
    return dict(sorted(sum(map(Counter, counters), Counter()).items()))


def finish(root, manifest):
    """Write the manifest (a dict): the data is complete."""
    files.write_atomic(root / "manifest.json", json.dumps(manifest, indent=2))
    drop_parts(root)


def drop_parts(root):
    """Delete the results that were kept for a resume."""
    for folder in (root, root / "heldout"):
        shutil.rmtree(folder / "parts", ignore_errors=True)
    (root / "parts.json").unlink(missing_ok=True)
