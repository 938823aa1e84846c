"""
Small things that every room needs: the one error for a person's mistakes, the one atomic write,
the one lock, the one duration. Nothing here imports torch.
"""
import contextlib
import fcntl
import importlib
import os
import shutil
import signal
import sys
import time


class UserError(ValueError):
    """A mistake in flags, files or data that a person can mend: one line, exit status 2."""


def first_line(error):
    """The first line of an exception's message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error):
    """Whether an exception means that memory ran out. Only CUDA has a type of its own for it."""
    kinds = (MemoryError, getattr(sys.modules.get('torch'), 'OutOfMemoryError', MemoryError))
    signs = ('out of memory', 'allocate memory', 'bad_alloc', 'alloc_failed', 'start new thread')
    return isinstance(error, kinds) or any(sign in str(error).lower() for sign in signs)


def show_error(kind, error, trace):
    """
    sys.excepthook of every script. A UserError, an OSError or a lack of memory becomes one line
    and exit status 2; everything else is a bug and keeps its traceback.
    """
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(130)
    if not issubclass(kind, (UserError, OSError)) and not out_of_memory(error):
        return sys.__excepthook__(kind, error, trace)
    message = str(error)
    if not issubclass(kind, (UserError, OSError)):
        message = ('out of memory; a smaller --batch_size or --block_size, or '
                   f'--activation_checkpointing=True, needs less ({first_line(error)[:200]})')
    print_error(message)
    raise SystemExit(2)


def print_error(message):
    """
    One line on stderr. Before torch.distributed is set up every process of a node meets the same
    error, so only rank 0 speaks; after that, a rank has an error of its own.
    """
    who, rank = script_name(), os.environ.get('RANK', '0')
    dist = sys.modules.get('torch.distributed')
    if rank != '0':
        own_error = dist is not None and dist.is_initialized()
        if not own_error and os.environ.get('LOCAL_RANK') != '0':
            return
        who += f': rank {rank}'
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr, flush=True)


def script_name():
    """The script as a person would type it: train.py, data/prepare.py."""
    path = os.path.relpath(sys.argv[0])
    return os.path.basename(path) if path.startswith(os.pardir) else path


def optional(module, purpose):
    """Import a library that only this purpose needs. UserError says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = module.split('.')[0]
        raise UserError(f'{purpose} needs {module}: pip install {package} ({first_line(e)})') from e


def duration(seconds):
    """'2d03h', '1h02m' or '3m04s'."""
    s = int(max(0, seconds))
    if s >= 86400:
        return f'{s // 86400}d{s // 3600 % 24:02d}h'
    if s >= 3600:
        return f'{s // 3600}h{s // 60 % 60:02d}m'
    return f'{s // 60}m{s % 60:02d}s'


@contextlib.contextmanager
def replacing(path, mode='wb', **kwargs):
    """
    Open a file beside `path` that takes its name when the block ends, with every byte on the
    disk. If the block raises, `path` is untouched and nothing temporary is left behind.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, mode, **kwargs) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def sync_folder(path):
    """Make the renames in a folder survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def link_or_copy(path, other):
    """Make `other` the same file as `path`, atomically; a copy where there are no hard links."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(f'{other}.tmp')
    try:
        os.link(path, f'{other}.tmp')
    except OSError:
        shutil.copyfile(path, f'{other}.tmp')
    os.replace(f'{other}.tmp', other)


class Locked(UserError):
    """Another process holds the lock; `holder` is the text that it left in the file."""
    def __init__(self, holder):
        super().__init__(f'in use by {holder}')
        self.holder = holder


def try_lock(path, text):
    """
    Lock `path` and write `text` into it for others to read. Returns the open file, which holds
    the lock until the process dies, however it dies. Locked if another process has it, OSError
    where the file system has no locks.
    """
    f = open(path, 'a+', encoding='utf-8')
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        holder = f.read() or 'another process, which is just starting'
        f.close()
        raise Locked(holder) from None
    f.truncate(0)
    f.write(text)
    f.flush()
    return f


class StopSignal:
    """
    The first SIGINT, SIGTERM or SIGHUP that this process gets, as `number` (0: none yet), which a
    loop looks at when it can stop. A second one, 2 seconds later or more, ends the process at once.
    """
    def __init__(self, notice=''):
        self.number, self.time, self.notice = 0, 0.0, notice
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
            if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # as nohup wants it
                signal.signal(getattr(signal, name), self.receive)

    def receive(self, number, frame):
        if self.number:  # torchrun passes signals on, so a job that gets one as a whole gets two
            if time.time() - self.time > 2:
                os._exit(128 + number)
            return
        self.number, self.time = number, time.time()
        with contextlib.suppress(OSError):  # the terminal may be gone
            text = f'{signal.Signals(number).name}: {self.notice}\n' if self.notice else ''
            os.write(1, text.encode())  # print is not reentrant
