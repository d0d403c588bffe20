"""A fixed set of requests in both hosts and of kernel calls, whose outcome a change of structure must not alter."""
