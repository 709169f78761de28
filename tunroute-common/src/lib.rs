//! The decision of tunroute's fast path and the layout of its maps, shared by the eBPF programs, the daemon and the
//! tests.
//!
//! [`decide_ingress`](decide::decide_ingress) and [`decide_egress`](decide::decide_egress) are pure functions over a
//! [`Packet`](packet::Packet) and a [`Lookup`](decide::Lookup). The kernel runs them over an skb and BPF maps, the tests
//! over a byte slice and a list of prefixes.
#![no_std]

pub mod decide;
pub mod index;
pub mod maps;
pub mod mss;
pub mod packet;
pub mod trace;
pub mod trie;
