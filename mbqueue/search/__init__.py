"""Search for good settings of an experiment, and spend epochs only on promising ones.

A trial is an experiment in the queue whose spec contains its search, so the queue contains everything about a search.
mbqueue never stores an Optuna study, but rebuilds the study from the queue when needed (`mbqueue.search.study`).
"""
