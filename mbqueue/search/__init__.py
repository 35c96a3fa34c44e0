"""Searches: try settings of an experiment, and spend epochs only on promising ones.

A trial is an experiment in the queue whose spec names its search, so the queue holds everything about a search.
Optuna's study is rebuilt from the queue for every question, and never stored (`mbqueue.search.study`).
"""
