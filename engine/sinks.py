"""
Log to Weights & Biases and TensorBoard. A sink is a class with numbers(), checkpoint() and close();
engine/run_log.py calls them.
"""
import atexit
import html
import json
import os

from engine.common import first_line


class WandbSink:
    """
    Log to Weights & Biases: numbers, a table of samples, and checkpoints as versions of one
    artifact.
    """
    def __init__(self, out_dir, facts, settings, console):
        folder = os.path.abspath(os.path.join(out_dir, 'wandb'))
        os.environ.setdefault('WANDB_DATA_DIR', folder)  # for its copies of checkpoints
        import wandb
        self.wandb, self.samples, self.artifacts = wandb, [], settings['wandb_artifacts']
        arguments = dict(project=settings['wandb_project'], name=settings['wandb_run_name'],
                         config=facts, dir=out_dir)
        try:
            limits = wandb.Settings(init_timeout=15, login_timeout=15)
            self.run = wandb.init(**arguments, settings=limits)
        except Exception as e:  # no network, no key, no such project
            self.run = wandb.init(**arguments, mode='offline')
            reason = first_line(e).replace('<no message>', 'it gave no reason')[:200]
            console.say(f"WARNING: wandb's server {wandb.setup().settings.base_url} cannot be used "
                        f'({reason}), so this run is recorded offline; to send it later: wandb '
                        f'sync {os.path.dirname(self.run.dir)}')

    def numbers(self, values, sample, step):
        if sample is not None:
            self.samples.append([step, sample])
            table = self.wandb.Table(columns=['iter', 'text'], data=self.samples)
            values = values | {'samples': table}
        self.run.log(values, step=step)

    def checkpoint(self, path, best, facts):
        if not self.artifacts:
            return
        name = f'checkpoint-{self.run.id}'
        artifact = self.wandb.Artifact(name, type='model', metadata=facts)
        add = artifact.add_dir if os.path.isdir(path) else artifact.add_file
        add(path)  # a copy, since the next checkpoint replaces this one
        aliases = ['latest', f"iter-{facts['iter']}"] + ['best'] * best
        self.run.log_artifact(artifact, aliases=aliases)

    def close(self):
        self.run.finish()


class TensorBoardSink:
    """Write TensorBoard event files with the names that wandb gets."""
    def __init__(self, out_dir, facts, settings, console):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(out_dir)
        atexit.register(self.writer.close)  # otherwise queued entries are lost if the run fails
        self.writer.add_text('config', f'<pre>{json.dumps(facts, indent=2)}</pre>')

    def numbers(self, values, sample, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        if sample is not None:
            self.writer.add_text('samples', f'<pre>{html.escape(sample)}</pre>', step)

    def checkpoint(self, path, best, facts):
        pass

    def close(self):
        self.writer.close()


SINKS = {'wandb': WandbSink, 'tensorboard': TensorBoardSink}  # by the setting NAME_log
