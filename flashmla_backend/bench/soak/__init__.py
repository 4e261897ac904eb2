"""A server under mixed load for a while: no request may fail, no answer may drift, no memory may grow.

The load is ragged, streamed, cancelled, shares prefixes and repeats itself, so that speculation has something to guess;
the cache is too small for all of it, so that requests are preempted. Between phases of load, one greedy canary prompt
is asked alone, and must be answered with the same tokens and the same bits of their probabilities every time.
"""
