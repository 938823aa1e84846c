arch_preset='llama'
n_layer=18
n_head=18
n_embd=2304
d_ff=6656
vocab_size=32000
block_size=2048
dataset='pystdlib'
