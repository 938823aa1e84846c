"""
Start scripts fast. A server process imports torch once and forks itself for every command, which
saves the two seconds that a new Python takes for the same imports. Each command is still a process
of its own, with its own arguments, environment, output and exit status.

    warm.run(['train.py', '--max_iters=3'], processes=2)
"""
import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading

HANGS = 300  # a process that takes more seconds is stuck, however busy the machine is
PRELOAD = 'numpy', 'torch', 'torch.distributed.fsdp', 'torch.distributed.optim'


def run(argv, cwd, env, processes=1, before='', text=True, timeout=HANGS):
    """
    Run a script, or several processes of it as torchrun would; each runs the Python code in `before`
    first. Returns what subprocess.run returns, with the output of one process after the other.
    """
    jobs = [Job(argv, cwd, env | variables, before) for variables in torchrun_variables(processes)]
    returncode = wait(jobs, timeout)
    out, err = (b''.join(job.written(stream) for job in jobs) for stream in ('out', 'err'))
    if text:
        out, err = out.decode(), err.decode()
    return subprocess.CompletedProcess(argv, returncode, out, err)


def torchrun_variables(processes):
    """The environment variables that torchrun would set, for each process; none for a single one."""
    if processes == 1:
        return [{}]
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = str(free.getsockname()[1])
    common = dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    return [common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]


class Job:
    """A process that the server forks. `answers` delivers its pid, then its exit status."""
    def __init__(self, argv, cwd, env, before):
        self.answers, answer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        message = json.dumps(dict(argv=argv, cwd=str(cwd), env=env, before=before)).encode()
        with answer:
            socket.send_fds(server(), [message], [self.out.fileno(), self.err.fileno(), answer.fileno()])
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
    """The exit status of a group of processes. When one of them fails, the others get SIGTERM."""
    waiting, returncode = {job.answers: job for job in jobs}, 0
    while waiting:
        ready = select.select(list(waiting), [], [], timeout)[0]
        if not ready:
            for job in waiting.values():
                kill(job.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired('a script', timeout)
        for answers in ready:
            code = int(answers.recv(100))
            waiting.pop(answers)
            answers.close()
            if code and not returncode:
                returncode = code
                for job in waiting.values():
                    kill(job.pid, signal.SIGTERM)
    return returncode


@functools.cache
def server():
    """Start the server. Returns our end of the socket to it; the server ends when this end is closed."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        env = os.environ | {'OMP_NUM_THREADS': '1'}
        subprocess.Popen([sys.executable, __file__, str(its.fileno())], pass_fds=[its.fileno()], env=env)
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


def exit_status(script):
    """
    Run a script as `python SCRIPT` would. The caller ends with os._exit, since an orderly exit of the
    interpreter touches all memory that is shared with the server, and copying it takes a second.
    """
    try:
        try:
            runpy.run_path(script, run_name='__main__')
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
    for name in PRELOAD:
        __import__(name)
    gc.collect()
    gc.freeze()
    command = next_command(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(command['cwd'])
    os.environ.clear()
    os.environ.update(command['env'])
    sys.argv = command['argv']
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    exec(command['before'], {})
    status = exit_status(sys.argv[0])
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)
