//! The network lab, the integration tests and the demo of tunroute.
