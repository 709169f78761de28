//! What stands where in the package, but for the binary and the manual pages.

/// Where a file comes from.
pub enum From {
    /// The source.
    Workspace(&'static str),
    /// What `tunroute/examples/documents.rs` has written.
    Documents(&'static str),
}

/// Each file, its place, and its mode. Those below `etc` are the operator's to change.
pub const FILES: &[(From, &str, u32)] = &[
    (From::Workspace("tunroute/systemd/tunroute.service"), "usr/lib/systemd/system/tunroute.service", 0o644),
    (From::Workspace("tunroute/debian/rt_protos.conf"), "etc/iproute2/rt_protos.d/tunroute.conf", 0o644),
    (From::Workspace("tunroute/debian/copyright"), "usr/share/doc/tunroute/copyright", 0o644),
    (From::Workspace("LICENSE-MIT"), "usr/share/doc/tunroute/LICENSE-MIT", 0o644),
    (From::Workspace("README.md"), "usr/share/doc/tunroute/README.md", 0o644),
    (From::Workspace("docs/packet.svg"), "usr/share/doc/tunroute/docs/packet.svg", 0o644),
    (From::Workspace("docs/guide.md"), "usr/share/doc/tunroute/docs/guide.md", 0o644),
    (From::Workspace("docs/configuration.md"), "usr/share/doc/tunroute/docs/configuration.md", 0o644),
    (From::Workspace("docs/operations.md"), "usr/share/doc/tunroute/docs/operations.md", 0o644),
    (From::Workspace("docs/xdp.md"), "usr/share/doc/tunroute/docs/xdp.md", 0o644),
    (From::Workspace("docs/limits.md"), "usr/share/doc/tunroute/docs/limits.md", 0o644),
    (From::Workspace("tunroute/examples/tunroute.toml"), "usr/share/doc/tunroute/examples/tunroute.toml", 0o644),
    (From::Workspace("tunroute/dashboard/grafana.json"), "usr/share/tunroute/grafana.json", 0o644),
    (From::Documents("tunroute.schema.json"), "usr/share/tunroute/tunroute.schema.json", 0o644),
    (From::Documents("status.schema.json"), "usr/share/tunroute/status.schema.json", 0o644),
    (From::Documents("tunroute.bash"), "usr/share/bash-completion/completions/tunroute", 0o644),
    (From::Documents("_tunroute"), "usr/share/zsh/vendor-completions/_tunroute", 0o644),
    (From::Documents("tunroute.fish"), "usr/share/fish/vendor_completions.d/tunroute.fish", 0o644),
];

/// Directories that are there although nothing is in them yet: the configuration's, and that of the tables' names.
pub const DIRECTORIES: &[&str] = &["etc/tunroute", "etc/iproute2/rt_tables.d"];

/// What dpkg runs, from `tunroute/debian`.
pub const MAINTAINER_SCRIPTS: &[&str] = &["postinst", "prerm", "postrm"];
