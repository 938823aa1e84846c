"""Judgements: python -m pytest tests/test_judge.py"""
import collections
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from conftest import ROOT, command, refused, succeeded, wait_until
from engine import judge_cost
from engine.job import Launcher, Run
from engine.judge import decide, is_hopeless, nominal_level
from engine.judge_power import verdict_of
from engine.judge_sides import DATA, Side, data_of, find
from engine.results import Evaluation, Result, read_run
from engine.study import run_all
from tests.warm import HANGS

# A train.py without a model, which resumes. Its losses depend on the seed and the gain, and a little on norm_eps.
# With a gain, it can hang at an iteration that a variable of the environment names.
TOY = '''
import json, os, random, signal, sys, time
from configurator import NonNegativeFloat, PositiveFloat, PositiveInt, Seed, configure

out_dir = 'out'
init_from = 'scratch'
device = 'cpu'
seed: Seed = 1
norm_eps: PositiveFloat = 1e-5
dataset = 'toy'
max_iters: PositiveInt = 8
epochs: PositiveFloat = None
warmup_iters = 3
lr_decay_iters: PositiveInt = None
eval_interval: PositiveInt = 2
eval_iters: PositiveInt = 4
log_interval: PositiveInt = 1
gain = 0.0  # the loss is lower by this
tokens = 100  # per iteration
params = 1000
flops = 6000.0  # per token
speed = 1e6  # tokens per second
crc = 7  # of the windows of val
crash_at = -1
config, given = configure(__file__)
globals().update(config)
GAIN = 0.0

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
os.makedirs(out_dir, exist_ok=True)
ckpt = f'{out_dir}/ckpt.json'
first = json.load(open(ckpt)) if os.path.exists(ckpt) else 0
startup = dict(total_params=params, flops_per_token=flops, hardware_peak_tflops=1.0, tokens_per_iter=tokens, device='')
log = dict(config=config | dict(eval_only=False), startup_info=startup, training_iterations=[], eval_steps=[],
           eval_windows=dict(n=eval_iters, tokens_each=8, crc=crc))
name = f'{out_dir}/run_{time.time_ns()}.json'

def write(path, content):
    with open('%s/tmp' % out_dir, 'w') as f:
        json.dump(content, f)
    os.replace(f.name, path)

noise = random.Random(f'{seed} {norm_eps} {gain} {GAIN}').gauss(0, 0.002)
for i in range(first, max_iters + 1):
    loss = round(4 - 2 * i / max_iters + (noise - gain - GAIN if i else 0), 5)
    if i % eval_interval == 0 or i == max_iters:
        val = dict(loss=loss, bits_per_byte=loss, window_losses=[loss] * eval_iters)
        log['eval_steps'].append(dict(iter=i, tokens=i * tokens, train_seconds=i * tokens / speed,
                                      train=dict(loss=loss), val=val))
    log['summary'] = dict(outcome='finished', iterations=i - first, iter_num=i)
    write(name, log)
    write(ckpt, i)
    if i == crash_at:
        raise RuntimeError('crashed on purpose')
    if i < max_iters:
        print('iter', i, flush=True)
        time.sleep(1e6 if gain and str(i) == os.environ.get('TOY_HANGS_AT') else 0)
        log['training_iterations'].append(dict(iter=i, loss=loss, memory=dict(all=1), mfu=dict(
            tokens_per_sec=speed, achieved_tflops=1e-3)))
'''


class Tree:
    """A copy of this repository, in git, with TOY as its train.py."""
    def __init__(self, folder):
        self.folder, self.out = folder, folder / 'out-judge'
        for part in 'engine', 'data':
            shutil.copytree(ROOT / part, folder / part, ignore=lambda _, names: [
                name for name in names if not name.endswith('.py')])
        for name in 'compare.py', 'configurator.py', 'model.py':
            shutil.copy(ROOT / name, folder)
        self.write('train.py', TOY)
        self.write('config/toy.py', 'gain = 0.0\n')
        self.write('.gitignore', 'out*\n*.bin\n')
        self.write('data/toy/train.bin', 'ids')
        self.write('data/toy/val.bin', 'ids')
        self.git('init', '--quiet')
        self.git('add', '.')
        self.git('commit', '--quiet', '--message=toy')

    def write(self, name, text):
        (self.folder / name).parent.mkdir(exist_ok=True, parents=True)
        (self.folder / name).write_text(text)

    def git(self, *words):
        who = '-c', 'user.name=test', '-c', 'user.email=test@localhost'
        subprocess.run(['git', *who, *words], cwd=self.folder, check=True)

    def git_says(self, *words):
        return subprocess.run(['git', *words], cwd=self.folder, check=True, capture_output=True, text=True).stdout

    @contextlib.contextmanager
    def edited(self, name, text):
        """The working tree differs from HEAD in this file, which may be a new one."""
        self.write(name, text)
        yield
        self.git('stash', '--quiet', '--include-untracked')
        self.git('stash', 'drop', '--quiet')

    def compare(self, *flags, **kwargs):
        return command(self.folder / 'compare.py', *flags, cwd=self.folder, **kwargs)

    def judge(self, *flags, **kwargs):
        """(exit status, last line of stdout as JSON, stdout) of a judgement that comes to a verdict."""
        done = self.compare(*flags, **kwargs)
        assert done.stdout and 'Traceback' not in done.stderr, done.stdout + done.stderr
        assert not (self.out / 'trees').exists()
        return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout

    def runs(self, gain, out='out-judge'):
        """The folders of runs with this gain, by seed."""
        paths = sorted(self.folder.glob(f'{out}/runs/*/settings.json'), key=lambda path: path.parent.name.split('=')[1])
        return [path.parent for path in paths if json.loads(path.read_text()).get('gain') == gain]


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    """Tests share it, and so the runs of its baseline. They leave its code as it is."""
    return Tree(tmp_path_factory.mktemp('judge') / 'tree')


# the decision

@pytest.mark.parametrize('alpha, max_pairs', [(0.05, 2), (0.05, 6), (0.01, 6), (0.2, 12)])
def test_all_tests_of_a_judgement_together_err_with_alpha(alpha, max_pairs):
    """A level for one test: with six looks, a null is found better three times as often."""
    level, n = nominal_level(alpha, max_pairs), 40_000
    d = np.random.Generator(np.random.MT19937(5)).standard_normal((n, max_pairs))
    p = [stats.ttest_1samp(d[:, :k], 0, axis=1, alternative='less').pvalue for k in range(2, max_pairs + 1)]
    assert np.mean(np.min(p, axis=0) < level) == pytest.approx(alpha, abs=4 * (alpha / n) ** 0.5)


def simulate(draw, gain, margin, judgements=1500, max_pairs=6):
    """(share of judgements that end with 'better', pairs on average); draw(rng, n): differences without a gain."""
    verdicts, pairs, level, rng = collections.Counter(), 0, nominal_level(0.05, max_pairs), np.random.default_rng(7)
    for _ in range(judgements):
        verdict, n = verdict_of(draw(rng, max_pairs) - gain, draw(rng, 3), margin, level)
        verdicts[verdict] += 1
        pairs += n
    return verdicts['better'] / judgements, pairs / judgements


@pytest.mark.parametrize('draw, margin, at_most', [
    (lambda rng, n: 0.35 * rng.standard_normal(n), 1, 0.02),  # pairs without a gain end early
    (lambda rng, n: rng.standard_normal(n), 1e-9, 0.05 + 0.02),  # never early: alpha, and 3 standard errors
    (lambda rng, n: rng.standard_t(3, n), 1e-9, 0.05 + 0.02),  # heavy tails
])
def test_a_change_that_does_nothing_is_seldom_better(draw, margin, at_most):
    assert simulate(draw, 0, margin)[0] <= at_most


def test_a_judgement_is_cheap_and_finds_a_gain_of_the_margin():
    """For pairs with a standard deviation of 0.35 margins."""
    def draw(rng, n):
        return 0.35 * rng.standard_normal(n)
    assert simulate(draw, 0, 1)[1] <= 1.5
    assert simulate(draw, 1, 1)[0] >= 0.9
    assert simulate(draw, 2, 1)[0] >= 0.98


@pytest.mark.parametrize('differences, noise, verdict', [
    ([-5.0], 0.1, None),  # a single pair is never better
    ([-5.0, -5.1], 0.1, 'better'),
    ([-5.0, -1.0], 0.1, None),
    ([-5.0, -1.0, -3.0], 0.1, None),
    ([-5.0, -4.0, -4.5, -4.2], 0.1, 'better'),
    ([0.0], 0.1, 'no difference'),
    ([0.3], 0.1, 'no gain'),
    ([5.0], 0.1, 'worse'),
    ([0.5], 0.5, 'no gain'),
    ([-0.9], 0.1, None),  # may be a gain of the margin
    ([-0.1], 0.1, 'no difference'),
    ([-0.5], 0.1, None),  # real changes are noisier than rounding
    ([0.0], 1.0, None),  # the noise is as large as the margin
    ([-2.0, 0.5, -2.0, 1.0, -2.0], 1.0, None),
    ([-2.0, 0.5, -2.0, 1.0, -2.0, 0.5], 1.0, 'undecided'),
])
def test_verdict(differences, noise, verdict):
    """With a margin of 1, and six pairs at most."""
    decision = decide(differences, [noise, -noise, noise], 1.0, nominal_level(0.05, 6), 6)
    assert decision.verdict == verdict, decision
    assert decision.difference == pytest.approx(np.mean(differences))


def result(iters, losses):
    evals = [Evaluation(i, 0, 0.0, 0.0, loss, np.array([loss])) for i, loss in losses.items()]
    return Result('', dict(max_iters=iters), {}, {}, evals, [], '', 0)


FALLING, FLAT = result(8, {0: 9, 4: 3, 6: 2.5, 8: 2}), result(8, {4: 2, 6: 1.9, 8: 2})


@pytest.mark.parametrize('baseline, iters, losses, hopeless', [
    (FALLING, 8, {}, False),
    (FALLING, 8, {0: 99}, False),  # nothing is learned yet
    (FALLING, 8, {4: 3.9}, False),
    (FALLING, 8, {4: 4.2}, True),  # the baseline gained 1 from here on
    (FALLING, 8, {4: 3, 6: 3.2}, True),
    (FALLING, 8, {4: 4.2, 6: 2, 8: 1}, True),  # however it ended, so that a verdict does not depend on timing
    (FALLING, 8, {4: 3, 6: 2.5, 8: 9}, False),  # the end is for the t-test
    (FALLING, 8, {5: 4.2}, True),
    (FALLING, 16, {6: 4.4, 8: 3.1}, False),  # twice as many iterations, of half the cost: half the share
    (FALLING, 16, {8: 4.2}, True),
    (FLAT, 8, {4: 2.05}, False),  # within the margin
    (FLAT, 8, {4: 1.99, 6: 1.89}, False),  # it leads
    (FLAT, 8, {6: 1.95}, False),
    (FLAT, 8, {6: 2.01}, True),
])
def test_a_run_that_trails_is_hopeless(baseline, iters, losses, hopeless):
    """A run that led was given up where the baseline's loss rose; one with more iterations was compared too early."""
    assert is_hopeless(result(iters, losses), baseline, margin=0.1) is hopeless


# the command

EDITS = {
    'a comment': ('\n# nothing\n', 'no difference', 1),
    'a gain': ('GAIN = 0.05', 'better', 0),
    'a loss': ('GAIN = -0.05', 'worse', 1),
}


@pytest.mark.parametrize('name', EDITS)
def test_an_edit_of_the_code_is_judged(tree, name):
    edit, verdict, status = EDITS[name]
    with tree.edited('train.py', TOY.replace('GAIN = 0.0', edit) if 'GAIN' in edit else TOY + edit):
        code, found, _ = tree.judge('--against=HEAD')
    assert (found['verdict'], code) == (verdict, status)
    assert len(found['by_seed']) == (3 if verdict == 'better' else 1)
    assert (tree.out / 'judge.png').stat().st_size > 1000
    assert edit.strip() in (tree.out / found['diff']).read_text() and found['commit'].endswith('-dirty')


@pytest.mark.parametrize('flags, verdict, status', [
    ('--gain=0.05', 'better', 0),
    ('--gain=0.05 --tokens=200', 'costs more', 1),
    ('--gain=0.05 --params=1100', 'costs more', 1),
    ('--gain=0.05 --flops=6600', 'costs more', 1),
    ('--gain=0.05 --speed=8e5', 'costs more', 1),
    ('--gain=0.05 --params=900', 'better', 0),
    ('--gain=-0.05', 'worse', 1),
    ('--gain=-0.05 --tokens=200', 'worse', 1),
    ('--gain=0.05 --crash_at=4', 'failed', 1),
    ('--gain=0.05 --crc=8', 'other evaluation', 2),
    ('--gain=0.05 --eval_iters=8', 'other evaluation', 2),
    ('--gain=-3', 'given up', 1),
])
def test_flags_are_judged(tree, flags, verdict, status):
    code, found, printed = tree.judge(f'--try={flags}')
    assert (found['verdict'], code) == (verdict, status)
    assert json.loads((tree.out / 'judged.jsonl').read_text().splitlines()[-1]) == found
    assert all(key in found for key in ('difference', 'interval', 'by_seed', 'runs', 'seconds', 'alpha'))
    assert f'\n{verdict} (' in printed and 'nan' not in printed
    left = [path for side in found['sides'] for path in tree.out.glob(f'runs/{side},*/ckpt*')]
    assert bool(left) == (verdict == 'failed')  # a full disk: the same command goes on


def test_a_run_that_trails_is_given_up_inside(tree):
    """It was trained to its end."""
    _, found, printed = tree.judge('--try=--gain=-2.5', env=dict(TOY_HANGS_AT='5'))
    assert found['verdict'] == 'given up' and 0 < found['runs']['candidate'] < 1
    assert 'given up at iteration' in printed


def test_runs_of_the_baseline_are_used_again(tree):
    tree.judge('--try=--gain=0.06')
    _, found, _ = tree.judge('--try=--gain=0.07')
    assert found['runs'] == dict(baseline=0, candidate=len(found['by_seed']), noise=0, trial=6)  # timed in turn


def test_a_run_that_hangs_fails(tree, monkeypatch):
    """A night of ideas ended at the first one that did not."""
    run = Run('a', 1, str(tree.folder / 'out-hangs'), {'gain': 1e-9}, 8)
    monkeypatch.setenv('TOY_HANGS_AT', '0')
    assert run_all([run], Launcher(str(tree.folder / 'train.py'), {'init_from': 'scratch'}, 1, []), limit=3) == [run]


@pytest.mark.parametrize('at, flags, iters', [
    ('flops', '--flops=12000', 4),
    ('flops', '--tokens=200', 4),
    ('flops', '--flops=3000 --speed=2e6', 16),  # it was given up, because it trailed at the same iteration
    ('flops', '--max_iters=16', 8),  # it kept its own, and so cost twice as much
    ('seconds', '--speed=5e5', 4),
    ('seconds', '--speed=5e5 --flops=1', 4),
])
def test_at_equal_cost(tree, at, flags, iters):
    code, found, printed = tree.judge(f'--at={at}', f'--try=--gain=0.08 {flags}')
    assert f'at equal {at} the candidate has {iters} iterations' in printed
    lengths = {read_run(folder).iter_num: read_run(folder).config['warmup_iters'] for folder in tree.runs(0.08)}
    assert lengths[iters] == 3 and 30 in lengths  # train.py would make the warmup of a shorter run shorter
    assert (found['verdict'], code) == ('better', 0)


def test_a_candidate_whose_trial_fails_has_failed(tree):
    """It was an error, as if the baseline had failed, and not in the ledger."""
    code, found, _ = tree.judge('--at=flops', '--try=--crash_at=5')
    assert (found['verdict'], code) == ('failed', 1)


@pytest.mark.parametrize('flags, words', [
    (['--against=nowhere'], ['nowhere', 'neither a folder']),
    (['--against=HEAD'], ['nothing to judge']),
    (['--try=--seed=5'], ['nothing to judge']),
    (['--try=--gain=1', '--norm_eps=1e-5,1e-6'], ['norm_eps', 'several values']),
    (['--try=gain'], ['--key=value', "'gain'"]),
    (['--try=--gain="1'], ['quotation']),
    (['--try=--gian=1'], ['gian', 'gain']),
    (['--try=--gain=1', '--max_pairs=1'], ['max_pairs']),
    (['--try=--gain=1', '--max_pairs=101'], ['max_pairs']),
    (['--try=--gain=1', '--crash_at=3'], ['baseline failed']),
    (['--try=--gain=1', '--epochs=2'], ['max_iters', 'epochs']),
    (['--try=--gain=1', '--dataset=none'], ['none', 'data set']),
    (['--ledger', '--out_dir=out-none'], ['out-none', 'no ledger']),
])
def test_a_judgement_that_cannot_be_is_refused(tree, flags, words):
    refused(tree.compare(*flags), *words)
    assert not (tree.out / 'trees').exists()


def test_another_folder_is_a_baseline(tree, tmp_path):
    """The code of a folder and of a commit is the same baseline, if it is the same code."""
    tree.judge('--try=--gain=0.05')
    shutil.copytree(tree.folder, tmp_path / 'old', ignore=shutil.ignore_patterns('out*', '.git'))
    with tree.edited('train.py', TOY.replace('GAIN = 0.0', 'GAIN = 0.06')):
        _, found, _ = tree.judge(f'--against={tmp_path / "old"}')
    assert found['verdict'] == 'better' and found['runs']['baseline'] == 0


def test_each_side_reads_its_own_config_file(tree):
    """A config file that the baseline lacks was an error; it holds settings for both sides."""
    with tree.edited('config/toy.py', 'gain = 0.05\n'):
        assert tree.judge('--against=HEAD', 'config/toy.py')[1]['verdict'] == 'better'
    with tree.edited('config/new.py', 'gain = 0.05\n'):
        assert tree.judge('--against=HEAD', 'config/new.py')[1]['verdict'] == 'no difference'


def test_runs_keep_what_a_config_file_says(tree):
    """Its init_from became 'auto', which trains new weights, and the decay ended at max_iters, which is a flag."""
    with tree.edited('config/toy.py', "init_from = 'gpt2'\nlr_decay_iters = 20\ngain = 0.09\n"):
        tree.judge('--against=HEAD', 'config/toy.py')
    found = [read_run(folder).config for folder in tree.out.glob('runs/*')]
    assert ('gpt2', 20) in [(c['init_from'], c['lr_decay_iters']) for c in found if c['gain'] == 0.09]


def test_a_flag_is_not_a_setting_of_a_file(tree):
    """The schedule follows max_iters if it is a flag, so runs with the same settings were taken for the same."""
    sides = [tree.judge('--try=--crash_at=2', *flags)[1]['sides'] for flags in ([], ['--max_iters=8'], ['--seed=1'])]
    assert sides[0] == sides[2] and sides[0][0] != sides[1][0]


def test_folders_of_code_are_copied(tree):
    """A folder within engine/ was opened as a file."""
    with tree.edited('engine/more/part.py', 'GAIN = 0.05\n'):
        tree.write('train.py', TOY.replace('GAIN = 0.0', 'from engine.more.part import GAIN'))
        assert tree.judge('--against=HEAD')[1]['verdict'] == 'better'


@pytest.mark.parametrize('name, verdict', [
    ('engine/evaluate.py', 'measured otherwise'),
    ('data/loader.py', 'measured otherwise'),
    ('engine/judge_cost.py', 'measured otherwise'),
    ('data/mine/prepare.py', 'better'),
])
def test_code_that_measures_must_not_be_edited(tree, name, verdict):
    """An edited evaluation with the same windows was found better."""
    before = (tree.folder / name).read_text() if (tree.folder / name).exists() else ''
    with tree.edited(name, before + '\nlower = True\n'):
        tree.write('train.py', TOY.replace('GAIN = 0.0', 'GAIN = 0.05'))
        code, found, printed = tree.judge('--against=HEAD')
    edited = [name] if verdict == 'measured otherwise' else []
    assert (code, found['verdict'], found['edited']) == (2 if edited else 0, verdict, edited)
    assert (f'NOTE: the sides differ in {name}, ' in printed) == bool(edited)
    assert tree.git_says('rev-parse', 'HEAD').startswith(found['against_commit'])


def test_a_data_set_is_prepared_once(tree):
    """Each side prepared its own, and the runs of later judgements had other keys."""
    with tree.edited('data/fresh/prepare.py', "from pathlib import Path\n"
                     "for name in ('train.bin', 'val.bin'):\n    Path(__file__).with_name(name).write_text('ids')\n"):
        for _ in range(2):
            _, found, _ = tree.judge('--try=--gain=0.05', '--dataset=fresh')
        assert found['runs']['candidate'] == 0 and (tree.folder / 'data' / 'fresh' / 'train.bin').exists()


def test_the_key_of_a_run_knows_what_it_reads(tmp_path):
    """Other weights had the same key; a file that no run reads changed it; meta.pkl was not linked."""
    for name in 'data/toy/train.bin', 'data/toy/meta.pkl', 'data/toy/.checked.json', 'data/toy/prepare.py', 'a/ckpt.pt':
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('x')
    settings = dict(dataset=str(tmp_path / 'data' / 'toy'), init_from=str(tmp_path / 'a'), teacher='')
    assert {os.path.basename(path) for path in data_of(settings)} == {'train.bin', 'meta.pkl', 'ckpt.pt'}
    assert {os.path.basename(path) for path in find(DATA, tmp_path)} == {'train.bin', 'meta.pkl', '.checked.json'}


def trial_run(seconds):
    """Results of 30 iterations, of which the first 5 are slow in any case."""
    times = [9] * 5 + [*seconds] * 25
    return SimpleNamespace(startup_info=dict(tokens_per_iter=1.0, flops_per_token=1.0), evals=[SimpleNamespace(
        train_seconds=sum(times))], iterations=[dict(mfu=dict(tokens_per_sec=1 / t)) for t in times])


@pytest.mark.parametrize('baseline, candidate, iters', [
    ([[1], [1], [1]], [[1.04], [1.04], [1.04]], 100),  # a clock is no better than that
    ([[1], [1], [1]], [[1.25], [1.25], [1.25]], 80),
    ([[1], [9], [1]], [[1.25], [9], [1.25]], 80),  # the machine was busy during one pair
    ([[1], [1], [1]], [[1, 1, 1, 1, 6]] * 3, 50),  # an optimizer that does its work every five iterations
    ([[1], [1], [1]], [[1], None], None),  # it failed, or did not end
])
def test_iterations_at_equal_seconds(monkeypatch, baseline, candidate, iters):
    """A busy machine changed the number of iterations, and with it the loss; a median hid what happens now and then."""
    settings = dict(max_iters=100, warmup_iters=10, lr_decay_iters=None)
    monkeypatch.setattr(judge_cost, 'make_side', lambda *args: Side(*args[:3], settings | args[2], 'a'))
    sides = Side('baseline', [], {}, settings, 'a'), Side('candidate', [], {}, settings, 'b')
    left = dict(baseline=iter(baseline), candidate=iter(candidate))

    def train(name, side, seed, limit=math.inf):
        assert side.tree == 'baseline' or limit < math.inf
        seconds = next(left[side.tree])
        return seconds and trial_run(seconds)
    result = SimpleNamespace(config=dict(max_iters=100, warmup_iters=7, lr_decay_iters=100))
    found = judge_cost.at_equal_cost(sides[1], sides[0], result, 'seconds', train)
    assert (found and found.settings['max_iters']) == iters
    if iters == 100:
        assert found is sides[1]
    elif found:  # the schedule is the baseline's, as train.py adapted it to a flag
        assert found.flags == dict(max_iters=iters, warmup_iters=7, lr_decay_iters=iters)


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_judgement_goes_on(tree, number):
    gain = 0.05 + number / 1000
    flags = f'--try=--gain={gain}', f'--out_dir=out-{number}'
    process = subprocess.Popen([sys.executable, 'compare.py', *flags], cwd=tree.folder, start_new_session=True,
                               env=os.environ | dict(TOY_HANGS_AT='5', OMP_NUM_THREADS='1'), stdout=subprocess.DEVNULL)
    folders = lambda: tree.runs(gain, f'out-{number}')
    wait_until(lambda: any(path.read_text() == '5' for f in folders() for path in f.glob('ckpt.json')), process)
    (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
    assert process.wait(HANGS) == (-9 if number == signal.SIGKILL else 143)
    assert (tree.folder / f'out-{number}' / 'trees').exists() == (number == signal.SIGKILL)
    code, found, _ = tree.judge(*flags)
    resumed = folders()[0]
    assert json.loads(max(resumed.glob('run_*.json')).read_text())['summary']['iterations'] == 8 - 5
    undisturbed = tree.judge(flags[0])
    assert code == undisturbed[0] == 0
    assert all(found[key] == undisturbed[1][key] for key in ('verdict', 'difference', 'interval', 'by_seed'))
    assert not (tree.folder / f'out-{number}' / 'trees').exists()


def test_ledger(tree):
    """A line that a kill had cut off was a traceback, and took the next line with it."""
    flags = '--try=--gain=0.05', '--out_dir=out-ledger'
    tree.judge(*flags)
    with tree.edited('new.py', ''):
        tree.judge('--against=HEAD', '--try=--crash_at=4', '--out_dir=out-ledger')
    path = tree.folder / 'out-ledger' / 'judged.jsonl'
    path.write_text(path.read_text() + path.read_text()[:100])
    tree.judge(*flags, '--alpha=0.01')
    done = tree.compare('--ledger', '--out_dir=out-ledger')
    succeeded(done, "NOTE: line 3 of 'out-ledger/judged.jsonl' is left out", '--gain=0.05', '| failed',
              '3 changes judged, 2 found better', '0.11 of them')


def test_without_git(tree, tmp_path):
    """After all runs, a verdict was lost for want of git, which only the name of the commit needs."""
    (tmp_path / 'python').symlink_to(sys.executable)
    code, found, _ = tree.judge('--try=--gain=0.05', env=dict(PATH=str(tmp_path)))
    assert (code, found['verdict'], found['commit']) == (0, 'better', None)
