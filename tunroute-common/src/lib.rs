//! The decision of tunroute's fast path and the layout of its maps, shared by the eBPF programs, the daemon and the
//! tests.
//!
//! [`decide`](decide::decide) is a pure function over a [`Packet`](packet::Packet) and a [`Lookup`](decide::Lookup). The
//! kernel runs it over an skb and BPF maps, the tests over a byte slice and a prefix trie.
#![no_std]

pub mod decide;
pub mod maps;
pub mod packet;
