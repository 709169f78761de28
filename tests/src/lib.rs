//! The network lab: namespaces, devices, captures and packet flows that the integration tests, the demo and the bench
//! stand on.
//!
//! Everything here is setup and observation: it calls `ip`, `tc` and `ping` as an operator would, and looks at frames
//! as the far end sees them. Nothing is ever changed outside the namespaces that the lab makes, and nothing is left
//! behind: each piece cleans up when dropped, and what a crashed run left is removed when the next one starts.
//!
//! [`World`] is the whole story of tunroute in six namespaces; start there.

pub mod capture;
pub mod daemon;
pub mod device;
pub mod earlier;
pub mod flow;
pub mod foreign;
pub mod inject;
pub mod lab;
mod netkit;
pub mod netns;
pub mod nft;
pub mod offload;
pub mod pace;
mod packet_socket;
pub mod plan;
pub mod rule_walk;
pub mod seen;
pub mod snapshot;
pub mod terminal;
pub mod traffic;
pub mod tun;
pub mod tunnel;
pub mod world;

pub use capture::Capture;
pub use daemon::{Counters, Daemon, DaemonOptions};
pub use device::{End, Mac};
pub use earlier::Earlier;
pub use flow::{Flow, FlowOptions, FlowReport, Watch};
pub use foreign::ForeignProgram;
pub use inject::Injector;
pub use lab::{Lab, Share};
pub use netns::Netns;
pub use plan::{Dual, TUNNELS, TunnelPlan};
pub use seen::{Direction, Seen};
pub use snapshot::Snapshot;
pub use terminal::Terminal;
pub use traffic::{Sender, bulk, ping, ping_briefly, reach};
pub use tun::{TunOptions, TunPair};
pub use tunnel::TunnelKind;
pub use world::{World, WorldBuilder};
