"""The long tests, which a plain run leaves out: python -m pytest -m soak --trials=20"""
import signal


def pytest_addoption(parser):
    parser.addoption('--trials', type=int, default=20, help='times that each soak test tries what it tries')


def pytest_configure(config):
    config.addinivalue_line('markers', 'soak: takes minutes and is left out, unless asked for by -m soak')
    config.option.markexpr = config.option.markexpr or 'not soak'
    for name in ('SIGINT', 'SIGHUP'):  # what nohup and a shell's & ignore, the runs that are tested would too
        if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
