"""Implementations of the operator. Each module serves one backend; `dispatch` chooses, `ops` calls."""
