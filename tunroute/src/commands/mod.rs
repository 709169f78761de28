//! What a person runs: the command line, each command's work, and what it prints.

pub mod cli;
pub mod doctor;
pub mod explain;
pub mod import;
pub mod preview;
pub mod text;
pub mod top;
pub mod trace;
pub mod verify;
