"""
Start scripts fast. A server process imports torch and our modules once and forks itself for every
command, which saves the two seconds that a new Python takes for the same imports. Each command is
still a process of its own, with its own arguments, environment, output and exit status. The scripts
that it starts, such as the runs of compare.py, are forks of it.

    warm.run(['train.py', '--max_iters=3'], processes=2)
"""
import atexit
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading

import torch.distributed

HANGS = 300  # a process that takes more seconds is stuck, however busy the machine is
GRACE = 60  # seconds that a process has to end once another one of its group has failed
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRELOAD = ('numpy.random', 'torch.distributed.fsdp', 'torch.distributed.optim', 'bench', 'compare',
           'engine.attention_map', 'engine.start', 'engine.startup_report', 'engine.text_metrics',
           'scipy.stats', 'matplotlib.figure')
OURS = 'bench', 'compare', 'configurator', 'data', 'engine', 'model'


def run(argv, cwd, env, processes=1, before='', text=True, timeout=HANGS):
    """
    Run a script, or several processes of it as torchrun would; each runs the Python code in `before`
    first. Returns what subprocess.run returns, with the output of one process after the other.
    """
    store = None
    if processes > 1:  # torchrun's agent holds it, too
        store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    compiler = processes > 1 or '--compile=True' in argv
    jobs = [Job(argv, cwd, env | torchrun_variables(rank, processes, store), before, compiler)
            for rank in range(processes)]
    returncode = wait(jobs, timeout)
    out, err = (b''.join(job.written(stream) for job in jobs) for stream in ('out', 'err'))
    if text:
        out, err = out.decode(), err.decode()
    return subprocess.CompletedProcess(argv, returncode, out, err)


def torchrun_variables(rank, processes, store):
    """The environment variables that torchrun would set for a rank; none for a single process."""
    if processes == 1:
        return {}
    return dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR='127.0.0.1', MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE='True',
                TORCHELASTIC_RESTART_COUNT='0')


class Job:
    """A process that the server forks. `answers` delivers its pid, then its exit status."""
    def __init__(self, argv, cwd, env, before, compiler):
        self.answers, answer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        message = json.dumps(dict(argv=argv, cwd=str(cwd), env=env, before=before)).encode()
        with answer:
            socket.send_fds(server(compiler), [message], [self.out.fileno(), self.err.fileno(), answer.fileno()])
        self.pid = int(self.answers.recv(100))

    def written(self, stream):
        """The bytes that the process has written to its 'out' or 'err'; closes the file."""
        with getattr(self, stream) as file:
            file.seek(0)
            return file.read()


def kill(pid, number):
    with contextlib.suppress(ProcessLookupError):  # it may have ended since
        os.kill(pid, number)


def wait(jobs, timeout):
    """
    The exit status of a group of processes. When one of them fails, the others have time to say and do what they still
    want to. Then they are killed, since they may wait for it for ever.
    """
    waiting, returncode = {job.answers: job for job in jobs}, 0
    while waiting:
        ready = select.select(list(waiting), [], [], GRACE if returncode else timeout)[0]
        if not ready:
            for job in waiting.values():
                kill(job.pid, signal.SIGKILL)
            if not returncode:
                raise subprocess.TimeoutExpired('a script', timeout)
        for answers in ready:
            code = int(answers.recv(100))
            waiting.pop(answers)
            answers.close()
            returncode = returncode or code
    return returncode


@functools.cache
def server(compiler):
    """
    Start a server, perhaps one with the part of torch's compiler that DDP and FSDP import, too. Returns our end of the
    socket to it; the server ends when this end is closed.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    preload = [*PRELOAD, 'torch._dynamo'] if compiler else PRELOAD
    with its:
        env = os.environ | {'OMP_NUM_THREADS': '1'}
        subprocess.Popen([sys.executable, __file__, str(its.fileno()), *preload], pass_fds=[its.fileno()], env=env,
                         stdout=subprocess.DEVNULL)  # engine/study.py looks for a terminal when it is imported
    return ours


def next_command(requests):
    """Fork a process for each command that arrives. Returns only in such a process, the command."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 2**20, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for fd in fds:
            os.close(fd)
    requests.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, err, answer = fds
    pid = os.fork()
    if pid:  # this process waits for the command and reports its exit status
        os.write(answer, str(pid).encode())
        status = os.waitpid(pid, 0)[1]
        os.write(answer, str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    os.close(answer)
    os.dup2(out, 1)
    os.dup2(err, 2)
    return json.loads(message)


class ForkingPopen(subprocess.Popen):
    """
    Popen for warm processes: a Python script runs in a fork of this process. It does so in
    `preexec_fn`, which never returns, so that the Python that was asked for never starts.
    """
    def __init__(self, args, *, env=None, preexec_fn=None, **kwargs):
        if args[0] == sys.executable and args[1].endswith('.py'):
            preexec_fn = functools.partial(begin_anew, args[1:], env or os.environ, preexec_fn or int)
        super().__init__(args, env=env, preexec_fn=preexec_fn, **kwargs)


def begin_anew(argv, env, before):
    """In a forked process, drop what a new Python would not have, and become a script."""
    gc.enable()  # Popen has disabled it
    atexit._clear()
    sys.excepthook = sys.__excepthook__
    os.closerange(3, os.sysconf('SC_OPEN_MAX'))  # among them the pipe by which Popen waits for exec()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    become(argv, dict(env), before)


def become(argv, env, before):
    """Call before(), and be what `python *ARGV` is from here on."""
    os.environ.clear()
    os.environ.update(env)
    sys.stdout = open(1, 'w', closefd=False)
    sys.stderr = open(2, 'w', buffering=1, errors='backslashreplace', closefd=False)
    script = os.path.abspath(argv[0])
    sys.argv, sys.path[0] = argv[:1] + argv[2:] if argv[0] == '-c' else argv, os.path.dirname(script)
    if not script.startswith(ROOT + os.sep):  # a copy of this repository has modules of its own
        for name in [name for name in sys.modules if name.split('.')[0] in OURS]:
            del sys.modules[name]
    fork = multiprocessing.get_context('fork')
    subprocess.Popen, multiprocessing.get_context = ForkingPopen, lambda method: fork
    before()
    status = exit_status(argv)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def exit_status(argv):
    """
    Run `python *ARGV`, of a script or of -c CODE. The caller ends with os._exit, since an orderly exit of the
    interpreter touches all memory that is shared with the server, and copying it takes a second.
    """
    try:
        try:
            if argv[0] == '-c':
                exec(argv[1], {'__name__': '__main__'})
            else:
                runpy.run_path(argv[0], run_name='__main__')
        except Exception:
            sys.excepthook(*sys.exc_info())
            return 1
    except SystemExit as e:  # also from the hook
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
            return 1
        return e.code or 0
    return 0


if __name__ == '__main__':
    sys.path[0] = ROOT
    for name in sys.argv[2:]:
        __import__(name)
    gc.collect()
    gc.freeze()
    command = next_command(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(command['cwd'])
    become(command['argv'], command['env'], functools.partial(exec, command['before'], {}))
