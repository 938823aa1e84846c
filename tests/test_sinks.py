"""Weights & Biases and TensorBoard: they show what the run log has, and a run does not depend on them."""
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conftest import assert_equal_states, checkpoint, missing, refused, run_logs, succeeded, train
from engine import run_log
from engine.checkpoint import State
from engine.console import Console
from tests.warm import HANGS

ALWAYS_LOGGED = {'loss', 'lr', 'val/loss', 'train/loss', 'val/bits_per_byte', 'gradients/norm', 'gradients/layers/wte',
                 'mfu/mfu_percent', 'memory/peak'}
BOOKKEEPING = {'gradients/iter', 'gradients/norm_at_iter'}


def numbers(entry, prefix=''):
    """{'val/loss': ...}: the numbers in an entry of the run log, under the names that sinks give them."""
    found = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            found |= numbers(value, f'{prefix}{key}/')
        elif isinstance(value, (int, float)):
            found[prefix + key] = value
    return found


def logged(out_dir):
    """{iteration: {name: number}} of the run log, without what sinks need not plot."""
    log, steps = run_logs(out_dir)[-1], {}
    for entry in log['eval_steps'] + log['training_iterations']:
        steps.setdefault(entry['iter'], {}).update(numbers(entry))
    assert ALWAYS_LOGGED | BOOKKEEPING <= steps[0].keys()
    for values in steps.values():
        for name in BOOKKEEPING & values.keys():
            del values[name]
    return steps


@pytest.fixture(scope='module')
def watched(text_set, tmp_path_factory):
    """The out_dir of the run of `finished` with every sink, wandb without an account."""
    out_dir = tmp_path_factory.mktemp('watched')  # with two samples, after the first iterations
    sinks = '--wandb_log=True', '--wandb_artifacts=True', '--wandb_run_name=seen', '--tensorboard_log=True'
    flags = '--save_interval=10', '--eval_interval=10', '--sample_interval=1', '--gradient_log_interval=5'
    env = {'HOME': str(out_dir), 'WANDB_API_KEY': '', 'WANDB__SERVICE_WAIT': str(HANGS)}
    done = train(text_set, out_dir, *flags, *sinks, env=env)
    succeeded(done)
    assert done.stdout.count('WARNING') == done.stdout.count('recorded offline') == 1, done.stdout
    return out_dir


@pytest.fixture(scope='module')
def wandb_run(watched):
    """(the folder of the run that wandb wrote, the records in it as wandb's own reader prints them)."""
    folder, = (watched / 'wandb').glob('offline-run-*')
    reader = [Path(sys.executable).parent / 'wandb', 'leet', 'inspect', '--json', folder]
    printed = subprocess.run(reader, capture_output=True, text=True, timeout=HANGS, check=True).stdout
    return folder, [json.loads(line) for line in printed.splitlines()]


def test_wandb_has_the_numbers_of_the_run_log(watched, wandb_run):
    """A dashboard lacks what was measured, or shows it at another iteration."""
    _, records = wandb_run
    run = next(record['run'] for record in records if 'run' in record)
    config = run['config']['update']
    assert run['display_name'] == 'seen' and config['n_layer'] == 2 and config['total_params'] > 0
    history = [record['history']['item'] for record in records if 'history' in record]
    steps = {}
    for row in history:
        steps[row['_step']] = {key: value for key, value in row.items() if not key.startswith(('_', 'samples'))}
    assert steps == logged(watched)
    with_samples = [row['_step'] for row in history if any(key.startswith('samples') for key in row)]
    assert with_samples == [e['iter'] for e in run_logs(watched)[-1]['eval_steps'] if 'sample' in e]


def test_wandb_has_a_table_of_all_samples(watched, wandb_run):
    """Each sample replaces the one before."""
    folder, _ = wandb_run
    tables = (folder / 'files/media/table').glob('samples_*')  # samples_STEP_HASH.table.json
    table = json.loads(max(tables, key=lambda path: int(path.name.split('_')[1])).read_text())
    samples = [[e['iter'], e['sample']] for e in run_logs(watched)[-1]['eval_steps'] if 'sample' in e]
    assert table['columns'] == ['iter', 'text'] and table['data'] == samples


def test_wandb_keeps_every_checkpoint_as_a_version_of_one_artifact(watched, wandb_run):
    """An artifact per checkpoint; or all versions refer to the file that the next checkpoint replaces."""
    _, records = wandb_run
    artifacts = [record['artifact'] for record in records if record.get('artifact', {}).get('type') == 'model']
    assert len(artifacts) == len(run_logs(watched)[-1]['checkpoints'])
    assert len({artifact['name'] for artifact in artifacts}) == 1
    assert {'latest', 'iter-20'} <= set(artifacts[-1]['aliases'])
    copies = [Path(content['local_path']) for artifact in artifacts for content in artifact['manifest']['contents']]
    assert copies[-1].read_bytes() == (watched / 'ckpt.pt').read_bytes() and len(set(copies)) == len(copies)
    assert all(watched in path.parents for path in copies)


def test_tensorboard_has_the_same_under_the_same_names(watched):
    """TensorBoard and wandb show different numbers, or the same under different names."""
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    reader = accumulator.EventAccumulator(str(watched), size_guidance={'scalars': 0, 'tensors': 0})
    reader.Reload()
    steps = {}
    for name in reader.Tags()['scalars']:
        for event in reader.Scalars(name):
            steps.setdefault(event.step, {})[name] = event.value
    expected = logged(watched)
    assert steps.keys() == expected.keys()
    for i, values in steps.items():
        assert values == pytest.approx(expected[i], rel=1e-6)
    samples = [event.tensor_proto.string_val[0].decode() for event in reader.Tensors('samples/text_summary')]
    assert len(samples) == sum('sample' in e for e in run_logs(watched)[-1]['eval_steps'])
    assert 'n_layer' in reader.Tensors('config/text_summary')[0].tensor_proto.string_val[0].decode()


def test_a_run_that_is_watched_is_the_same_run(finished, watched):
    """A sink draws random numbers or changes settings of torch."""
    assert_equal_states(checkpoint(finished[0]), checkpoint(watched))


def test_a_run_without_wandb_is_the_same_run(text_set, finished, tmp_path):
    """A missing logger ends the run, or changes it."""
    done = train(text_set, tmp_path, '--wandb_log=True', before=missing('wandb'))
    succeeded(done, 'without wandb')
    assert_equal_states(checkpoint(finished[0]), checkpoint(tmp_path))


def test_tensorboard_that_is_missing_is_one_line(text_set, tmp_path):
    """torch's import of tensorboard fails with a traceback."""
    done = train(text_set, tmp_path / 'out', '--tensorboard_log=True', before=missing('tensorboard'))
    refused(done, 'pip install tensorboard')
    assert not (tmp_path / 'out').exists()


class NotFound(http.server.BaseHTTPRequestHandler):
    """Answers with status 404 and nothing else, as a server does that is not W&B's."""
    def do_POST(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_wandb_without_a_reason_names_the_server(text_set, tmp_path):
    """A wrong WANDB_BASE_URL is answered with '(<no message>)'."""
    pytest.importorskip('wandb')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}'
        env = {'HOME': str(tmp_path), 'WANDB_BASE_URL': url, 'WANDB_API_KEY': 'a' * 40}
        done = train(text_set, tmp_path / 'out', '--max_iters=1', '--wandb_log=True', env=env)
        server.shutdown()
    succeeded(done, f'server {url} cannot be used', 'recorded offline')
    assert 'no message' not in done.stdout


def test_only_rank_0_waits_for_a_free_log_name(tmp_path, monkeypatch):
    """Every rank waits for a name of the log that only rank 0 writes."""
    monkeypatch.setattr(run_log.time, 'strftime', lambda form: '20260101_000000')
    monkeypatch.setattr(run_log.time, 'sleep', pytest.fail)
    (tmp_path / 'run_20260101_000000.json').touch()
    run_log.RunLog(str(tmp_path), {}, {}, State(), 1, Console(speaks=False))
