"""Searches: trying settings of an experiment, and spending epochs only on those that are promising.

A trial is an experiment of the queue whose spec names its search, so all that is known of a search stands in
the queue. Optuna's study is built from that whenever it is asked, and never kept (`mbqueue.search.study`).
"""
