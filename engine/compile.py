"""torch.compile: whether it pays, and what happens where it does not work."""
import time

from engine.common import first_line, out_of_memory


def choose_compile(setting, given, device, expected, eval_only):
    """(whether to compile, why) for compile=setting; expected: seconds that the run will take."""
    if 'compile' in given:
        why = 'as asked'
    elif setting != 'auto':
        why = 'as before'
    elif device.type == 'cuda':
        why = 'default on a GPU'
    elif device.type == 'mps':
        why = 'not tried on mps'
    elif expected > 600:
        why = 'a long run'
    else:
        why = 'the run is too short to pay for it'
    if setting != 'auto':
        return setting, why
    long_on_cpu = device.type == 'cpu' and expected > 600 and not eval_only
    return device.type == 'cuda' or long_on_cpu, why


def compile_model(model, loss, X, Y, autocast, parallel, console, fallback_note=''):
    """
    Compile the model in place and try a forward and backward of loss(model, X, Y). Returns whether
    it works: a compiler that fails, for want of a C++ compiler say, costs one warning, not the run.
    """
    started = time.time()
    # FSDP gathers weights between blocks, which cannot be compiled.
    modules = model.transformer.h if parallel.mode == 'fsdp' else [model]
    console.say('compiling the model (a minute or so) ...')
    for module in modules:
        module.compile()
    try:
        with autocast():
            loss(model, X, Y).backward()
    except Exception as e:  # the compiler and its tools raise all kinds
        if out_of_memory(e):
            raise
        console.say('WARNING: torch.compile failed on this machine, going on without it, slower'
                    f'{fallback_note}: {first_line(e)}')
        for module in modules:
            module._compiled_call_impl = None
        if parallel.mode == 'fsdp':
            model.reset_iter_state()
        return False
    finally:
        model.zero_grad(set_to_none=True)
    console.say(f'compiled in {time.time() - started:.0f} s')
    return True
