//! What happens to a host in a year: each fault under a steady flow of forwarded packets and of the host's own, with
//! somebody else's rules, routes and programs around. Nothing may leak, go astray, or stay broken, and what is foreign
//! stays as it was.

mod asleep;
mod devices;
mod objects;
mod programs;
mod random;
mod scene;
mod service;
mod tools;
