"""Searches: try settings of an experiment, and spend epochs only on promising ones.

A trial is an experiment in the queue whose spec names its search, so the queue holds everything about a search. mbqueue
rebuilds Optuna's study from the queue for every question, and never stores it (`mbqueue.search.study`).
"""
