//! The decision of tunroute's fast path and the layout of its maps, shared by the eBPF program, the daemon and the tests.
#![no_std]
