"""The text of one sample as it grows, and where it ends."""
import codecs


class Continuation:
    """
    Takes tokens one by one and returns the pieces of text that they add. The sample ends before an
    id of `ends` or before a stop string ('stop'), or after max_new_tokens ('length'); `finish` says
    which, and is None until then. Pieces have whole characters only, and do not show what may still
    become a stop string. `end_of_turn` is one whose beginning is not shown at last either.
    """
    def __init__(self, tokenizer, max_new_tokens, ends=(), stop_strings=(), end_of_turn=''):
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.ends, self.end_of_turn = ends, end_of_turn
        stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        self.stop_strings = [str(text) for text in (*stop_strings, end_of_turn) if text]
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.ids, self.text, self.n_shown = [], '', 0
        self.finish = None if max_new_tokens else 'length'

    def push(self, token):
        """Add a token. Return the next piece of the text, which may be empty."""
        if self.finish:
            return ''
        self.ids.append(token)
        if token in self.ends:
            self.finish = 'stop'
        else:
            self.text += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        found = [self.text.find(stop) for stop in self.stop_strings if stop in self.text]
        if found:
            self.finish, self.text = 'stop', self.text[:min(found)]
        elif not self.finish and len(self.ids) == self.max_new_tokens:
            self.finish = 'length'
            self.text = self.text[:len(self.text) - self.n_undecided([self.end_of_turn])]
        end = len(self.text) - (0 if self.finish else self.n_undecided(self.stop_strings))
        piece, self.n_shown = self.text[self.n_shown:end], end
        return piece

    def n_undecided(self, stop_strings):
        """Return how many characters at the end may be the beginning of a stop string."""
        return max((n for stop in stop_strings for n in range(1, len(stop))
                    if self.text.endswith(stop[:n])), default=0)
