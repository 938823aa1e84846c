"""
Small helpers for every module: user errors, atomic writes, locks, durations. Nothing here imports
torch.
"""
import contextlib
import ctypes
import fcntl
import importlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder of the scripts
GIB = 2 ** 30


class UserError(ValueError):
    """
    A mistake in flags, files or data that the user can fix. It is shown as one line, with exit
    status 2.
    """


def first_line(error):
    """Return the first line of an exception's message, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def user_errors():
    """Turn a ValueError of the model, which names an argument, into a UserError."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e)) from e


def out_of_memory(error):
    """
    Return whether an exception means that memory ran out. Only CUDA has an exception type for it.
    """
    kinds = (MemoryError, getattr(sys.modules.get('torch'), 'OutOfMemoryError', MemoryError))
    signs = ('out of memory', 'allocate memory', 'bad_alloc', 'alloc_failed', 'start new thread')
    return isinstance(error, kinds) or any(sign in str(error).lower() for sign in signs)


def show_error(kind, error, trace):
    """
    Show an uncaught exception; this is sys.excepthook of every script. A UserError, an OSError or
    an out-of-memory error becomes one line and exit status 2. Anything else is a bug and keeps its
    traceback.
    """
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(130)
    if not issubclass(kind, (UserError, OSError)) and not out_of_memory(error):
        return sys.__excepthook__(kind, error, trace)
    message = str(error)
    if not issubclass(kind, (UserError, OSError)):
        message = ('out of memory; try a smaller --batch_size, --block_size or model, or '
                   f'--activation_checkpointing=True ({first_line(error)[:200]})')
    print_error(message)
    raise SystemExit(2)


def print_error(message):
    """
    Print one line on stderr. Before torch.distributed is initialized all processes of a node meet
    the same error, so only the first one prints it. After that every rank prints its own.
    """
    who, rank = script_name(), os.environ.get('RANK', '0')
    dist = sys.modules.get('torch.distributed')
    if rank != '0':
        own_error = dist is not None and dist.is_initialized()
        if not own_error and os.environ.get('LOCAL_RANK') != '0':
            return
        who += f': rank {rank}'
    line = printable(' '.join(message.split()))
    if len(line) > 900:  # it quotes something huge
        line = f'{line[:600]} ... {line[-250:]}'
    clear = CLEAR_LINE if sys.stdout.isatty() and sys.stderr.isatty() else ''
    print(f"{clear}{in_colour(f'{who}:', RED, sys.stderr)} {line}", file=sys.stderr, flush=True)


CLEAR_LINE = '\r\033[K'  # erases the progress line of a terminal
RED, YELLOW, CYAN = 31, 33, 36


def in_colour(text, colour, stream):
    """Colour a text on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    plain = os.environ.get('NO_COLOR') or not stream.isatty()
    return text if plain else f'\033[{colour}m{text}\033[0m'


def highlight(text, stream):
    """Colour a WARNING or NOTE at the start of a text."""
    for word, colour in (('WARNING:', YELLOW), ('NOTE:', CYAN)):
        if text.startswith(word):
            return in_colour(word, colour, stream) + text.removeprefix(word)
    return text


def printable(text):
    """
    Escape the control characters in a text, except newlines and tabs. Text from a model or a file
    could otherwise move the cursor or rewrite what a terminal shows.
    """
    control = r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]'  # the last: bidirectional
    return re.sub(control, lambda match: match[0].encode('unicode_escape').decode(), text)


def terminal_width():
    """Return the width for help texts: the terminal's, but at least 60 and at most 100 columns."""
    return max(60, min(shutil.get_terminal_size().columns, 100))


@contextlib.contextmanager
def reader_may_exit():
    """Print within this block. If the reader of stdout, such as head, exits, drop the rest."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the interpreter flushes again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def script_name():
    """Return the script's path as a user would type it: train.py, data/prepare.py."""
    path = os.path.relpath(sys.argv[0])
    return os.path.basename(path) if path.startswith(os.pardir) else path


def optional(module, purpose):
    """
    Import a library that only `purpose` needs. If it is missing, UserError says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = module.split('.')[0]
        raise UserError(f'{purpose} needs {module}: pip install {package} ({first_line(e)})') from e


def duration(seconds):
    """Format seconds as '2d03h', '1h02m' or '3m04s'."""
    s = int(max(0, seconds))
    if s >= 86400:
        return f'{s // 86400}d{s // 3600 % 24:02d}h'
    if s >= 3600:
        return f'{s // 3600}h{s // 60 % 60:02d}m'
    return f'{s // 60}m{s % 60:02d}s'


def create(path, mode='wb', **kwargs):
    """
    Open a new file for writing. An existing one is removed first, so that nothing is written
    through a link that somebody has put there.
    """
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    return open(path, mode.replace('w', 'x'), **kwargs)  # x: fails if the file exists


@contextlib.contextmanager
def replacing(path, mode='wb', **kwargs):
    """
    Open a temporary file that replaces `path` when the block ends and all bytes are on disk. If the
    block raises, `path` is unchanged and the temporary file is removed. Its name is always the
    same, so a kill leaves at most one, which the next write removes.
    """
    temporary = f'{path}.tmp'
    try:
        with create(temporary, mode, **kwargs) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def sync_folder(path):
    """Flush a folder to disk, so that renames in it survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def remove(path):
    """Remove a file or a folder if it exists."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def link_or_copy(path, other):
    """Replace `other` atomically by a hard link to `path`, or by a copy if links are impossible."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(f'{other}.tmp')
    try:
        os.link(path, f'{other}.tmp')
    except OSError:
        with open(path, 'rb') as source, create(f'{other}.tmp') as copy:
            shutil.copyfileobj(source, copy)
    os.replace(f'{other}.tmp', other)


class Locked(UserError):
    """
    Raised if another process holds the lock. `holder` is the text that it wrote into the file.
    """
    def __init__(self, holder):
        super().__init__(f'in use by {holder}')
        self.holder = holder


def try_lock(path, text):
    """
    Lock `path` and write `text` into it for others to read. Return the open file, which holds the
    lock until the process ends. Raise Locked if another process has it, UserError if it is a link
    or not a file, and OSError if the file system has no locks.
    """
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise UserError(f"'{path}' should be a plain file for a lock, which it is not: remove it")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    f = open(os.open(path, flags, 0o666), 'r+', encoding='utf-8')
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = f.read() or 'another process, which is just starting'
        f.close()
        raise Locked(holder) from None
    f.truncate(0)
    f.write(text)
    f.flush()
    return f


def end_with_parent():
    """Send this process SIGTERM when its parent dies, however that happens (on Linux only)."""
    if sys.platform == 'linux':
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_script(script, *flags):
    """Run a Python script, which ends when this process does. Return its exit status."""
    command = [sys.executable, script, *flags]
    return subprocess.run(command, preexec_fn=end_with_parent).returncode


class StopSignal:
    """
    Tell a loop to save and end. Before listen(), SIGINT, SIGTERM and SIGHUP end the process at
    once, even in a long call into C++. After it, the first one sets `status`, the exit status to
    end with (0: none yet), and a second one more than 2 seconds later ends the process at once. A
    signal that nohup ignores stays ignored.
    """
    def __init__(self, notice=''):
        self.status, self.time, self.notice = 0, 0.0, notice
        self.handle(signal.SIG_DFL)

    def listen(self):
        self.handle(self.receive)

    def handle(self, action):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, action)

    def receive(self, number, frame):
        if self.time:  # torchrun forwards signals, so one sent to the whole job arrives twice
            if time.time() - self.time > 2:
                os._exit(128 + number)
            return
        self.status, self.time = 128 + number, time.time()
        with contextlib.suppress(OSError):  # the terminal may be gone
            start = '\n' if os.isatty(1) else ''  # after the progress line
            text = f'{start}{signal.Signals(number).name}: {self.notice}\n' if self.notice else ''
            os.write(1, text.encode())  # print is not reentrant

    def try_reading(self, read):
        """
        Return read(). If it fails, because a file is gone or damaged, print the error, set `status`
        to 2 and return None.
        """
        try:
            return read()
        except (OSError, UserError) as e:
            print_error(str(e))
            self.status = 2
