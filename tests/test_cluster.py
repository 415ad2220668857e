"""On a real SLURM of one node: what a table needs becomes jobs, and whatever happens to them, nothing is lost.

Debian's packages slurm-wlm and munge are enough for it; elsewhere these tests are skipped.
"""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
import torch
from typer.testing import CliRunner

import advdpnp.cluster
import advdpnp.runs
from advdpnp.cli import app
from advdpnp.cluster import Slurm, Task, as_cluster, bill, cancel, failure, piece_of, run_on, submit, wait_for
from advdpnp.core import differing, read_json, read_weights
from advdpnp.runs import Ledger, claim, claims, make_config, owner, status
from advdpnp.tables import make_table
from advdpnp.training import load_state

from conftest import TINY

HERE = Path(__file__).parent
COMMAND = f"""
import sys
import advdpnp.runs
from advdpnp.cli import app
advdpnp.runs.PRESETS["quick"] |= {TINY}
app()
"""
TABLE = ["table", "1", "--preset", "quick", "--methods", "standard, DPNP", "--device", "cpu"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    "A SLURM of one node, this one."
    path = f"{os.environ['PATH']}:/usr/sbin"
    if lacking := [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(tool, path=path)]:
        pytest.skip(f"there is no {', '.join(lacking)}: apt-get install slurm-wlm munge")
    pytest.importorskip("submitit")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        said = subprocess.run([HERE / "local-slurm", "start", folder], capture_output=True, text=True, timeout=60)
        assert said.returncode == 0, said.stderr
        with pytest.MonkeyPatch.context() as change:
            change.setenv("SLURM_CONF", said.stdout.strip().partition("=")[2])
            change.setenv("PYTHONPATH", str(HERE.parent))
            yield
    finally:
        subprocess.run(["scancel", "--user", str(os.getuid())], capture_output=True)
        subprocess.run([HERE / "local-slurm", "stop", folder])


def command(folder, *words):
    "The command, as a shell would start it, with settings that take a second."
    words = [*TABLE, "--data-dir", folder, "--cluster", "slurm", "--slurm", "timeout_min=5", *words]
    return subprocess.Popen([sys.executable, "-c", COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, cwd=folder)


def until(what, seconds=120):
    "Wait until something holds."
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "this takes too long"
        time.sleep(0.1)
    return found


def without_clock(record):
    "What a record says, without how long it took and in which process."
    if isinstance(record, dict):
        return {key: without_clock(value) for key, value in record.items() if not key.endswith("seconds")}
    return [without_clock(value) for value in record] if isinstance(record, list) else record


def test_two_commands_make_a_table_together_and_one_that_is_killed_finds_its_jobs_again(slurm, tmp_path, monkeypatch):
    folder = tmp_path / "cluster"
    folder.mkdir()
    asked, killed, other = (command(folder) for _ in range(3))
    until(lambda: len([*folder.glob("runs/*/*/job-*.json")]) == 4 and [*folder.glob("jobs/*_log.err")])
    killed.kill()
    killed.communicate()
    asked.send_signal(signal.SIGINT)
    said = asked.communicate()[1]
    assert "the same command goes on from here" in said or "4 done" in said  # on a busy machine it may be done by then
    again = command(folder)
    for process in (other, again):
        shown, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert "| DPNP |" in shown and "| standard |" in shown
    assert "train: 0 submitted" in said or "result: 0 submitted" in said or "jobs" not in said
    names = sorted(path.name for path in folder.glob("runs/*/*/job-*.json"))
    assert names == ["job-result-1.json"] * 2 + ["job-train-1.json"] * 2  # nothing twice
    assert len([*folder.glob("jobs/*_submitted.pkl")]) == 4
    # the records are those of this machine without a cluster
    monkeypatch.setitem(advdpnp.runs.PRESETS, "quick", advdpnp.runs.PRESETS["quick"] | TINY)
    make_table(1, "quick", "", "standard, DPNP", device="cpu", data_dir=tmp_path / "here", jobs=2, quiet=True)
    for method in ("standard", "DPNP"):
        one, two = (read_json(of / f"runs/digits/{method}-cifar_resnet8-quick-s0/result.json")
                    for of in (folder, tmp_path / "here"))
        assert not differing(without_clock(one), without_clock(two))


LONG = TINY | dict(train_images=None, batch_size=4, epochs=3)  # epochs of some seconds


def at_work(folder):
    "Whether a job trains a run."
    return (folder / "machines.json").exists() and (owner(folder, "train") or {}).get("node")


def starts(folder):
    "How often the last job of a run was started."
    log = Path(read_json(claims(folder, "train")[-1])["log"]).with_suffix(".out")
    return log.exists() and log.read_text().count("Starting with")


def process_of(job):
    "The process that does a job."
    array, _, task = job.partition("_")
    said = f"SLURM_ARRAY_JOB_ID={array}\0", f"SLURM_ARRAY_TASK_ID={task}\0"
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, around = (path / "cmdline").read_text(), (path / "environ").read_text()
            if "python" in words.split("\0")[0] and all(word in around for word in said):
                return int(path.name)


def each_at_work(*hits):
    "When a job of a run is at work for the n-th time, it gets a signal, or is named to a command of SLURM."
    def one(hit):
        folder, time_number, what = hit
        until(lambda: starts(folder) == time_number and at_work(folder))
        job = owner(folder, "train")["id"]
        subprocess.run([*what, job], check=True) if isinstance(what, list) else os.kill(process_of(job), what)

    with ThreadPoolExecutor() as threads:
        [*threads.map(one, hits)]


def test_jobs_that_are_told_to_stop_or_killed_end_with_the_same_bits(slurm, tmp_path):
    ledger, through = (Ledger(tmp_path / name, "cpu", quiet=True) for name in ("cluster", "here"))
    asked, hit = (make_config("standard", "quick", seed, "cpu", **LONG) for seed in (0, 1))
    wild = make_config("standard", "quick", 2, "cpu", **TINY, lr=1e20)
    pieces = asked_piece, hit_piece, wild_piece = [piece_of(ledger, "train", config) for config in (asked, hit, wild)]
    folder, state = ledger.folder, lambda: load_state(ledger.folder(asked) / "state.pt")
    again = lambda *configs: submit(Slurm(dict(timeout_min=5)), tmp_path / "jobs", Task(), [
        (piece_of(ledger, "train", config), ledger.data_dir, "cpu", False, False, "train", config)
        for config in configs])

    first = again(asked, hit, wild)
    assert first == [f"{first[0].partition('_')[0]}_{task}" for task in range(3)]
    # one is told of its time limit in the middle of an epoch: it saves and goes back into the queue; one is killed
    each_at_work((folder(asked), 1, signal.SIGUSR2), (folder(hit), 1, signal.SIGKILL))
    until(lambda: (folder(asked) / "state.pt").exists())
    assert state()["batch"] > 0
    until(lambda: owner(folder(hit), "train") is None)
    # the one that was killed is submitted anew, and cancelled; the other one is put back by an administrator
    second, = again(asked, hit)
    assert [path.name for path in claims(folder(hit), "train")] == ["job-train-1.json", "job-train-2.json"]
    before = state()["seconds"]
    each_at_work((folder(asked), 2, ["scontrol", "requeue"]), (folder(hit), 1, ["scancel"]))
    lost = wait_for(pieces)
    assert lost == [hit_piece, wild_piece] and state()["seconds"] > before and starts(folder(asked)) == 3
    said = [str(failure(piece)) for piece in lost]
    assert "CANCELLED" in said[0] and f"job {second}: " in said[0] and "_log.err" in said[0]
    assert "FloatingPointError: the loss is not finite" in said[1] and "_log.err" in said[1]
    # it is submitted a third time, and ends
    assert again(hit) and wait_for([asked_piece, hit_piece]) == []
    for config in (asked, hit):
        through.train(config)
        one, two = (read_weights(of.folder(config) / "last.safetensors") for of in (through, ledger))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_jobs_can_be_left_alone_and_ended(slurm, tmp_path):
    config = make_config("standard", "quick", 0, "cpu", **LONG)
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    run_on(Slurm(wait=False), ledger, "cpu", [config])
    word, said = status(ledger.folder(config))
    assert word in ("queued", "running") and said.count("job ") == 2
    shown = CliRunner().invoke(app, ["runs", "--data-dir", str(tmp_path)]).stdout
    assert "digits/standard-cifar_resnet8-quick-s0," in shown and ", job " in shown
    with pytest.raises(RuntimeError, match="of SLURM has"):
        ledger.train(config)
    assert len(cancel(tmp_path)) == 2
    until(lambda: owner(ledger.folder(config), "train") is None)
    assert cancel(tmp_path) == []


# Without a SLURM


@pytest.fixture
def jobs(monkeypatch):
    "What SLURM says: id to state and node; None if it does not answer."
    found = {}
    monkeypatch.setattr(advdpnp.runs, "queue", lambda now=False: found.get("all", {}))
    return found


def test_a_step_is_claimed_by_one_job_at_a_time(tmp_path, jobs):
    write = lambda path, **about: path.write_text(json.dumps(about))
    first = claim(tmp_path, "train")
    assert claim(tmp_path, "train") is None and claim(tmp_path, "result").name == "job-result-1.json"
    os.utime(first, (1, 1))  # its command was killed before it could submit
    second = claim(tmp_path, "train")
    assert second.name == "job-train-2.json"
    write(second, id="12_3", log="")
    jobs["all"] = {"12_3": ("PENDING", "")}
    assert claim(tmp_path, "train") is None and status(tmp_path)[0] == "queued"
    jobs["all"] = {"12_3": ("RUNNING", "node7")}
    assert status(tmp_path) == ("running", "after 0 epochs, job 12_3 on node7")
    jobs["all"] = None  # SLURM does not answer: who knows
    assert claim(tmp_path, "train") is None
    jobs["all"] = {}
    for number in range(3, 12):  # numbers, not letters, say which is the last
        path = claim(tmp_path, "train")
        assert path.name == f"job-train-{number}.json"
        write(path, id=str(number), ended="done")


def test_a_job_whose_claim_is_not_the_last_one_does_nothing(tmp_path, jobs):
    ledger, config = Ledger(tmp_path, "cpu", quiet=True), make_config("standard", "quick", device="cpu", **TINY)
    old = claim(ledger.folder(config), "train")
    os.utime(old, (1, 1))
    claim(ledger.folder(config), "train")
    with pytest.raises(RuntimeError, match="another job has this work"):
        Task()(old, tmp_path, "cpu", False, False, "train", config)
    assert not ledger.trained(config)


def test_a_wrong_word_for_a_cluster_gets_a_sentence(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match="unknown parameter of SLURM 'gpu_per_node': did you mean 'gpus_per_node'"):
        advdpnp.cluster.parse_slurm("gpu_per_node=1")
    with pytest.raises(ValueError, match="expected name=value"):
        advdpnp.cluster.parse_slurm(["partition"])
    with pytest.raises(ValueError, match="mem_gb is '1.5': expected a whole number"):
        advdpnp.cluster.parse_slurm("mem_gb=1.5")
    with pytest.raises(ValueError, match="unknown parameter of SLURM 'array_parallelism'"):
        advdpnp.cluster.parse_slurm("array_parallelism=4")
    assert advdpnp.cluster.parse_slurm(["exclude=node1,node2, mail_type=END,FAIL", "use_srun=false", "exclusive=true",
                                        "setup=module load cuda", "gpus_per_node=1"]) == dict(
        slurm_exclude="node1,node2", slurm_mail_type="END,FAIL", slurm_use_srun=False, slurm_exclusive=True,
        slurm_setup=["module load cuda"], gpus_per_node=1)
    for word, said in (("nodes=2", "a run is one process"), ("ntasks_per_node=4", "a run is one process"),
                       ("use_srun=no", "expected true or false"), ("account=a,account=b", "account is given twice")):
        with pytest.raises(ValueError, match=said):
            advdpnp.cluster.parse_slurm(word)
    assert advdpnp.cluster.parse_slurm(["account=0123, timeout_min=5,", "setup=module load a", "setup=module load b",
                                        "srun_args=--mpi=none --cpu-bind=none"]) == dict(
        slurm_account="0123", timeout_min=5, slurm_setup=["module load a", "module load b"],
        slurm_srun_args=["--mpi=none", "--cpu-bind=none"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="there is no SLURM here"):
        as_cluster("slurm")
    with pytest.raises(ValueError, match="expected one by name"):
        make_table(1, cluster=Slurm(), data_dir=tmp_path)


def test_a_bill_starts_nothing_and_counts_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setitem(advdpnp.runs.PRESETS, "quick", advdpnp.runs.PRESETS["quick"] | TINY)
    there, new = (make_config("standard", "quick", seed, "cpu") for seed in (0, 1))
    ledger = Ledger(tmp_path, "cpu", quiet=True)
    record = ledger.run(there)
    before = sorted(tmp_path.rglob("*"))
    items = bill(ledger, [(there, "result"), (new, "result")])
    assert [item.state for item in items] == ["there", "missing"]
    assert items[1].training == record["training_seconds"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_job_that_slurm_does_not_end_is_an_error(tmp_path, jobs, monkeypatch):
    folder = tmp_path / "runs/digits/a-run"
    write_claim = claim(folder, "train")
    write_claim.write_text(json.dumps(dict(id="7_0")))
    jobs["all"] = {"7_0": ("RUNNING", "node1")}
    said = subprocess.CompletedProcess([], 1, "", "scancel: error: Access/permission denied")
    monkeypatch.setattr(advdpnp.cluster, "queue", lambda now=False: jobs["all"])
    monkeypatch.setattr(advdpnp.cluster.subprocess, "run", lambda *args, **how: said)
    with pytest.raises(RuntimeError, match="SLURM did not end 7_0: scancel: error: Access/permission denied"):
        cancel(tmp_path)
    jobs["all"] = {"7_0": ("COMPLETING", "node1")}
    assert cancel(tmp_path) == ["7_0"]


def test_a_folder_that_came_from_a_cluster_says_what_to_do(tmp_path, monkeypatch):
    "Here is no SLURM that could say what has become of the job."
    monkeypatch.setattr(advdpnp.runs, "queue", lambda now=False: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    path = claim(tmp_path, "train")
    path.write_text(json.dumps(dict(id="7_0")))
    with pytest.raises(RuntimeError, match=f"if the job is no more, remove {path}"):
        with advdpnp.runs.at_work(tmp_path):
            pass


def test_damaged_files_of_others_stop_no_list(tmp_path):
    first, second = (tmp_path / f"TRADES-net-quick-s{seed}" for seed in (0, 1))
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(epochs=3)))
    (first / "result.json").write_text("{")
    (second / "trained.json").write_text("{}")
    for name in ("job-foo-1.json", "job-train-1 (copy).json"):
        (second / name).write_text("{}")
    with filelock.FileLock(second / "lock"):
        assert status(first)[0] == "damaged" and status(second) == ("running", "after 0 epochs, measuring")


def test_times_of_other_data_or_of_training_without_attacks_are_not_taken():
    config = make_config("PGD-AT", "fast", device="cpu")
    made = lambda **changes: dict(config=config | changes, training_seconds=100.0,
                                   best=dict(sha256="a", seconds=1.0), last=dict(sha256="b", seconds=2.0))
    assert advdpnp.cluster.usual_seconds([made(method="TRADES")], config, 0) == 100
    assert advdpnp.cluster.usual_seconds([made(method="standard")], config, 0) is None
    assert advdpnp.cluster.usual_seconds([made(dataset="svhn")], config, 0) is None
