"""What must stay true: python -m pytest tests/test_sinks.py"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import assert_equal_states, checkpoint, logged, refused, run_logs, train


def test_a_run_without_wandb_is_the_same_run(text_set, finished, tmp_path):
    """A missing logger that ends the run, or changes it."""
    (tmp_path / 'stub' / 'wandb').mkdir(parents=True)
    (tmp_path / 'stub' / 'wandb' / '__init__.py').write_text('raise ImportError("No module named wandb")')
    done = train(text_set, tmp_path / 'out', '--wandb_log=True', env={'PYTHONPATH': str(tmp_path / 'stub')})
    assert done.returncode == 0 and 'without wandb' in done.stdout
    assert_equal_states(checkpoint(finished[0]), checkpoint(tmp_path / 'out'))


@pytest.fixture(scope='module')
def watched(text_set, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('watched')
    done = train(text_set, out_dir, '--save_interval=10', '--sample_interval=1', '--gradient_log_interval=5', '--wandb_log=True', '--wandb_artifacts=True', '--tensorboard_log=True',
                 '--wandb_run_name=seen', env={'HOME': str(out_dir), 'WANDB_API_KEY': ''})
    assert done.returncode == 0 and done.stdout.count('WARNING') == done.stdout.count('recorded offline') == 1, done.stdout + done.stderr
    return out_dir


def test_wandb_has_everything_and_its_own_reader_finds_it(watched):
    """A dashboard that lacks what was measured, or shows it at another iteration."""
    run, = (watched / 'wandb').glob('offline-run-*')
    printed = subprocess.run([Path(sys.executable).parent / 'wandb', 'leet', 'inspect', '--json', run], capture_output=True, text=True, timeout=100, check=True).stdout
    records = list(map(json.loads, printed.splitlines()))
    start = next(r['run'] for r in records if 'run' in r)
    assert start['display_name'] == 'seen' and start['config']['update']['n_layer'] == 2 and start['config']['update']['total_params'] > 0
    history = [r['history']['item'] for r in records if 'history' in r]
    steps = {row['_step']: {k: v for k, v in row.items() if not k.startswith(('_', 'samples'))} for row in history}
    evaluations = [e['iter'] for e in run_logs(watched)[-1]['eval_steps']]
    assert steps == logged(watched) and [row['_step'] for row in history if any(k.startswith('samples') for k in row)] == evaluations
    table = json.loads(sorted((run / 'files/media/table').glob('samples_*'), key=os.path.getmtime)[-1].read_text())
    assert table['columns'] == ['iter', 'text'] and table['data'] == [[e['iter'], e['sample']] for e in run_logs(watched)[-1]['eval_steps']]
    artifacts = [r['artifact'] for r in records if r.get('artifact', {}).get('type') == 'model']
    assert len(artifacts) == len(run_logs(watched)[-1]['checkpoints']) and len({a['name'] for a in artifacts}) == 1 and {'latest', 'iter-20'} <= set(artifacts[-1]['aliases'])
    copies = [Path(content['local_path']) for a in artifacts for content in a['manifest']['contents']]
    assert copies[-1].read_bytes() == (watched / 'ckpt.pt').read_bytes() and len(set(copies)) == len(copies) and all(watched in path.parents for path in copies)


def test_tensorboard_has_the_same_under_the_same_names(watched):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator').EventAccumulator(str(watched), size_guidance={'scalars': 0, 'tensors': 0})
    reader.Reload()
    steps = {}
    for name in reader.Tags()['scalars']:
        for event in reader.Scalars(name):
            steps.setdefault(event.step, {})[name] = event.value
    expected = logged(watched)
    assert {i: values.keys() for i, values in steps.items()} == {i: values.keys() for i, values in expected.items()}
    for i, values in steps.items():
        assert values == pytest.approx(expected[i], rel=1e-6)
    samples = [e.tensor_proto.string_val[0].decode() for e in reader.Tensors('samples/text_summary')]
    assert len(samples) == len(run_logs(watched)[-1]['eval_steps']) and 'n_layer' in reader.Tensors('config/text_summary')[0].tensor_proto.string_val[0].decode()


def test_a_run_that_is_watched_is_the_same_run(finished, watched):
    assert_equal_states(checkpoint(finished[0]), checkpoint(watched))


def test_tensorboard_that_is_missing_is_one_line(text_set, tmp_path):
    (tmp_path / 'tensorboard.py').write_text('raise ImportError("not here")')
    refused(train(text_set, tmp_path / 'out', '--tensorboard_log=True', env={'PYTHONPATH': str(tmp_path)}), 'pip install tensorboard')
    assert not (tmp_path / 'out').exists()


