"""The cluster: access to the API server, the observed state, and the execution of plans.

The only package that imports `kubernetes`. All of it is asyncio; every request has a
timeout and a bound on its retries.
"""
