"""Answers and programs that nobody trusts, judged in processes that may be killed."""
