//! What should be: policies and observed state compiled to rules, routes and maps, and the changes that lead there. Pure.

pub mod ability;
pub mod compile;
pub mod devices;
pub mod fast;
pub mod gates;
pub mod model;
pub mod net;
pub mod plan;
pub mod xdp_devices;
