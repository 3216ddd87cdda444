"""Bad input of every kind that the library takes: cases made from (kind, number), run in batches, counted by outcome.

A case is a function of a random generator and an empty folder. It hands something to the library and says ``"right"``
where the answer was compared with one that is known, ``"accepted"`` where it was looked over (finite, of the right
shape), or lets the library's `GpurhoError` through, which counts as ``refused``. Anything else is a failure: another
exception, a message of more than one line, a warning or a word of a foreign library, NaN in a field, a wrong answer,
memory beyond the limit, too much time, or the end of the process.
"""
