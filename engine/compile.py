"""Decide whether torch.compile pays off, and continue without it where it fails."""
import time

from engine.common import first_line, out_of_memory


def choose_compile(settings, given, device, expected):
    """Return (whether to compile, reason). `expected` is the run's expected time in seconds."""
    setting = settings['compile']
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
    long_on_cpu = device.type == 'cpu' and expected > 600 and not settings['eval_only']
    return device.type == 'cuda' or long_on_cpu, why


def compile_model(model, loss, batches, flex, autocast, parallel, console):
    """
    Compile the model in place and try a forward and backward pass of loss(model, X, Y) on a
    micro-batch. Return whether it works. If the compiler fails (for example without a C++
    compiler), warn and leave the model uncompiled. `flex` says whether the compiled model masks
    documents with flex attention.
    """
    X, Y = batches.loader.batch(range(batches.batch_size))
    started = time.time()
    # FSDP gathers weights between blocks, which cannot be compiled.
    modules = model.transformer.h if parallel.mode == 'fsdp' else [model]
    console.say('compiling the model (a minute or so) ...')
    for module in modules:
        module.compile()
    try:
        with autocast():
            loss(model, X, Y).backward()
    except Exception as e:  # the compiler and its tools raise many types
        if out_of_memory(e):
            raise
        dense = ', with a dense doc_mask' if flex else ''
        console.say('WARNING: torch.compile failed on this machine; continuing without it, which '
                    f'is slower{dense}: {first_line(e)}')
        for module in modules:
            module._compiled_call_impl = None
        if parallel.mode == 'fsdp':
            model.reset_iter_state()
        return False
    finally:
        model.zero_grad(set_to_none=True)
    console.say(f'compiled in {time.time() - started:.0f} s')
    return True
