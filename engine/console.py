"""Print for the person at the keyboard: lines that last, and one that shows the progress."""
import os
import shutil
import sys
import time

from engine.common import CLEAR_LINE, highlight, printable


class Console:
    """
    Print on rank 0 only, with control characters escaped. On a terminal the last line shows the
    progress, and is rewritten ten times per second. Elsewhere a sign of life is printed after 10
    seconds without a line. A terminal that closes does not end the run.
    """
    def __init__(self, speaks=True):
        self.speaks, self.last_time, self.last_progress = speaks, time.time(), 0.0
        self.terminal = speaks and sys.stdout.isatty()
        self.share_done, self.status = 0.0, ''  # of the run; set where iterations are reported
        sys.stdout.reconfigure(errors='replace')  # samples may not fit its encoding

    def say(self, text):
        """Print a line, or several."""
        clear = CLEAR_LINE if self.terminal else ''
        self._write(f'{clear}{highlight(printable(text), sys.stdout)}\n')

    def progress(self, text=''):
        """Show the status of the run, and what it is doing right now."""
        now, line = time.time(), ', '.join(part for part in (text, self.status) if part)
        if not self.terminal:
            if now - self.last_time > 10:
                self.say(f'  ... {line}')
            return
        if now - self.last_progress < 0.1:
            return
        self.last_progress = now
        width = shutil.get_terminal_size().columns - 1  # the last column would start a new line
        self._write(CLEAR_LINE + f'{bar(self.share_done)} {printable(line)}'[:width])

    def _write(self, text):
        if self.speaks:
            try:
                print(text, end='', flush=True)
            except OSError:
                sys.stdout = open(os.devnull, 'w')
        self.last_time = time.time()


def bar(share, width=20):
    """Draw a share from 0 to 1: '[=====               ]  25%'."""
    return f"[{'=' * int(share * width):<{width}}] {100 * share:3.0f}%"
