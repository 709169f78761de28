//! Builds the bench's eBPF programs into `OUT_DIR`.

#[path = "../../tunroute/build/ebpf.rs"]
mod ebpf;

fn main() {
    ebpf::build("tunroute-bench-ebpf", "ebpf", &["traffic", "floors"]);
}
