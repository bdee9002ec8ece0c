# SPDX-License-Identifier: Apache-2.0
"""For every lane: Ctrl-C works in the tests and in what they start, however they were started."""

import signal

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that send it would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
