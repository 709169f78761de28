//! Builds the eBPF programs into `OUT_DIR/tunroute-ebpf`, from where the fast path embeds them.

mod ebpf;

fn main() {
    ebpf::build("tunroute-ebpf", "../tunroute-ebpf", &["tunroute-ebpf"]);
}
