//! The `tunroute` command.
fn main() {}
