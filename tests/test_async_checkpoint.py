"""Checkpoints that are written while training goes on."""
import math
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from conftest import (
    MUON,
    SMALL_DISK,
    assert_equal_states,
    checkpoint,
    contents,
    copy_run,
    copy_sharded,
    losses,
    run_logs,
    succeeded,
    train,
    train_mode,
)
from engine import background, checkpoint_writer, run_folder
from engine.background import Copies
from engine.checkpoint import load_checkpoint
from engine.parallel import Parallel
from engine.run_folder import RunFolder
from tests.test_survival import faulty
from tests.warm import HANGS

ASYNC = '--async_checkpoint=True'


@pytest.mark.parametrize('mode, flags', [
    ('one', []),
    ('one', ['--sharded_checkpoint=False', *MUON]),
    ('ddp', []),
    ('zero1', []),
    ('fsdp', []),
    ('zero1', ['--sharded_checkpoint=True']),
    ('fsdp', ['--sharded_checkpoint=True']),
])
def test_it_holds_what_training_held_when_it_was_due(modes, mode, flags):
    """The steps that follow change what is being written, or collectives of the two threads meet."""
    waiting, beside = modes(mode, *flags)[0], modes(mode, ASYNC, *flags)[0]
    assert losses(waiting) == losses(beside)
    is_sharded = '--sharded_checkpoint=True' in flags
    for name, iter_num in (('ckpt_sharded_prev', 10), ('ckpt_sharded', 20)) if is_sharded else \
            (('ckpt_prev.pt', 10), ('ckpt.pt', 20)):
        ckpt = load_checkpoint(beside / name)
        assert ckpt['iter_num'] == iter_num
        assert_equal_states(load_checkpoint(waiting / name), ckpt)
    assert not list(beside.glob('*.tmp'))


@pytest.fixture
def held(monkeypatch):
    """An event that holds back the writing of checkpoints until it is set."""
    event, write = threading.Event(), checkpoint_writer.save_checked

    def write_later(content, f):
        assert event.wait(HANGS)
        write(content, f)
    monkeypatch.setattr(checkpoint_writer, 'save_checked', write_later)
    return event


def save(folder, weight, iter_num, reports):
    sets = {'model': {'wte': weight, 'head': weight}, 'optimizer': {'0/exp_avg': weight}}
    facts = dict(model_args={}, iter_num=iter_num)
    folder.save(sets, [], facts, [], reports.append, background=True)


@pytest.mark.parametrize('sharded', [False, True])
def test_nothing_is_said_or_replaced_before_it_is_on_disk(tmp_path, held, sharded):
    """A run says 'saved' and is then killed; or a tied weight is copied and written twice."""
    folder, weight, reports = RunFolder(str(tmp_path), sharded, Parallel()), torch.ones(1000, 300), []
    save(folder, weight, 1, reports)
    weight.zero_()
    assert not folder.poll() and not reports and not folder.used()
    held.set()
    folder.finish()
    ckpt = load_checkpoint(tmp_path)
    assert len(reports) == 1 and all((t == 1).all() for t in ckpt['model'].values())
    paths = [p for p in tmp_path.rglob('*.pt') if p.name != 'info.pt']
    assert [p.stat().st_size // weight.nbytes for p in paths] == [2]  # the weight and its moment


def test_the_next_one_waits_for_it(tmp_path, held, monkeypatch):
    """Two threads write the same file."""
    folder, weight, reports = RunFolder(str(tmp_path), False, Parallel()), torch.ones(10), []
    times = iter([0, 1, 5, 12])  # of the start and the end of each save

    def clock():
        now = next(times)
        if now == 5:  # only the next one lets the first one be written
            held.set()
        return now
    monkeypatch.setattr(run_folder, 'time', SimpleNamespace(time=clock))
    save(folder, weight, 1, reports)
    assert not reports
    save(folder, weight, 2, reports)
    assert reports == [1]
    folder.finish()
    assert reports == [1, 12 - 5]
    assert [load_checkpoint(tmp_path / name)['iter_num'] for name in ('ckpt.pt', 'ckpt_prev.pt')] == [2, 1]


def test_a_failure_is_kept_until_all_processes_ask(tmp_path, held):
    """The thread's error is lost, and the run goes on without checkpoints."""
    folder, reports = RunFolder(str(tmp_path), False, Parallel()), []
    save(folder, torch.full((10,), math.nan), 1, reports)
    held.set()
    folder.writing.join()
    assert folder.poll() and folder.poll() and not reports
    with pytest.raises(ValueError, match='could not be written.*not finite'):
        folder.finish()
    folder.finish()
    assert not folder.used() and not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize('mode', ['one', 'zero1'])
def test_a_full_disk_ends_the_run_and_keeps_the_last_one(text_set, finished, tmp_path, mode):
    """The run goes on to its end without a checkpoint, or ranks wait for each other for ever."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    before = contents(out_dir)
    done = train_mode(mode, text_set, out_dir, '--init_from=resume', '--max_iters=1000000', '--save_interval=1', ASYNC,
                      before=SMALL_DISK)
    assert done.returncode and done.stderr.count('could not be written') == 1, done.stderr
    assert 'Traceback' not in done.stderr and contents(out_dir) == before


def test_damage_to_a_sharded_one_ends_all_processes(text_set, sharded, tmp_path):
    """One process takes the file of another for good."""
    out_dir = copy_sharded(sharded('fsdp'), tmp_path / 'out')
    before = {path: path.read_bytes() for path in (out_dir / 'ckpt_sharded').iterdir()}
    done = train_mode('fsdp', text_set, out_dir, '--init_from=resume', '--max_iters=1000000', '--save_interval=1',
                      '--sharded_checkpoint=True', ASYNC, before=faulty('flip:rank_0001.pt'))
    assert done.returncode and done.stderr.count('could not be written') == 1, done.stderr
    assert before == {path: path.read_bytes() for path in before}


def test_a_kill_while_it_is_written_leaves_the_last_one(text_set, finished, tmp_path):
    """The run cannot go on, or goes on as another one."""
    out_dir = copy_run(finished[0], tmp_path / 'out', 'ckpt_prev.pt')
    flags = '--init_from=resume', '--save_interval=5', ASYNC
    killed = train(text_set, out_dir, *flags, before=faulty('kill:ckpt.pt.tmp'))
    assert killed.returncode == -signal.SIGKILL and (out_dir / 'ckpt.pt.tmp').exists()
    succeeded(train(text_set, out_dir, *flags))
    assert_equal_states(checkpoint(finished[0]), checkpoint(out_dir))


def test_it_must_be_large_and_leave_half_of_the_memory(monkeypatch, capsys):
    """A small run's lines come late for nothing; or a large one runs out of memory at its first checkpoint."""
    copies = Copies(Parallel())
    small, large = ({'model': {'wte': torch.empty(n, device='meta')}} for n in (10 ** 6, 10 ** 9))
    monkeypatch.setattr(background, 'free_memory', lambda device: 8 * 10 ** 9)
    assert copies.worth_making(large) and not copies.worth_making(small)
    monkeypatch.setattr(background, 'free_memory', lambda device: 8 * 10 ** 9 - 1)
    copies.copied = 0
    assert not copies.worth_making(large) and not copies.worth_making(large)
    assert capsys.readouterr().out.count('NOTE: training waits') == 1


def test_without_memory_for_a_copy_it_waits_even_if_asked_not_to(tmp_path, monkeypatch, capsys):
    """With --async_checkpoint=True, the kernel's killer ends a run at its first checkpoint."""
    monkeypatch.setattr(background, 'free_memory', lambda device: 0)
    folder, reports = RunFolder(str(tmp_path), False, Parallel()), []
    for iter_num in (1, 2):
        save(folder, torch.ones(10), iter_num, reports)
        assert folder.writing is None and len(reports) == iter_num
    assert load_checkpoint(tmp_path)['iter_num'] == 2 and capsys.readouterr().out.count('NOTE: training waits') == 1


def test_the_memory_of_the_copy_before_does_not_count_as_used(monkeypatch):
    """malloc keeps it for the next copy, so the second checkpoint of a run finds too little and training waits."""
    copies, large = Copies(Parallel()), {'model': {'wte': torch.empty(10 ** 9, device='meta')}}
    for free in (8, 4, 4):
        monkeypatch.setattr(background, 'free_memory', lambda device, free=free: free * 10 ** 9)
        assert copies.worth_making(large)


def test_zero1_copies_the_moments_of_all_processes(monkeypatch):
    """Rank 0 counts its own share, copies all, and is killed at the first checkpoint."""
    parallel = Parallel()
    monkeypatch.setattr(parallel, 'mode', 'zero1')
    monkeypatch.setattr(parallel, 'gather_objects', lambda value, group=None: 8 * [value])
    weight, moment = (torch.empty(n, device='meta') for n in (10 ** 9, 25 * 10 ** 7))
    sets = {'model': {'wte': weight, 'lm_head': weight}, 'optimizer': {'0/exp_avg': moment}}
    for free, worth in ((24, True), (23, False)):  # the copy has 4 and 8 GB; a tied weight counts once
        monkeypatch.setattr(background, 'free_memory', lambda device, free=free: free * 10 ** 9)
        assert Copies(parallel).worth_making(sets) == worth


FAILS_WHILE_IT_IS_WRITTEN = """
import threading
import torch
from engine import background, checkpoint_writer
write, embedding, failed = checkpoint_writer.save_checked, torch.nn.functional.embedding, threading.Event()

def write_later(content, f):
    failed.wait()
    write(content, f)

def fail_beside_it(*args, **kwargs):
    if any(isinstance(t, background.Background) for t in threading.enumerate()):
        failed.set()
        raise TypeError('a bug')
    return embedding(*args, **kwargs)

checkpoint_writer.save_checked, torch.nn.functional.embedding = write_later, fail_beside_it
"""


def test_an_error_lets_it_finish_and_the_log_says_so(text_set, tmp_path):
    """A run that ends by an error in the next iteration loses the checkpoint, or leaves it out of its log."""
    done = train(text_set, tmp_path, '--save_interval=5', ASYNC, before=FAILS_WHILE_IT_IS_WRITTEN)
    assert done.returncode == 1 and 'a bug' in done.stderr
    (log,) = run_logs(tmp_path)
    assert [entry['iter'] for entry in log['checkpoints']] == [5] == [checkpoint(tmp_path)['iter_num']]
