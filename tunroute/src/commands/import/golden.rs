//! Files in, configurations out: each example is a snapshot with its input, to be read as documentation.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{File, draft, parse};
use crate::config::Config;

/// The name of an example, and its files.
type Example = (&'static str, &'static [(&'static str, &'static str)]);

const EXAMPLES: &[Example] = &[
    (
        "quoting_and_variables",
        &[(
            "vpn.sh",
            r#"#!/bin/bash
IP=/sbin/ip
LAN='10.8.0.0/24'
OPTIONS="table 200 priority 100"
export DEV="wg0"           # not `wg1`
$IP rule add from $LAN \
    $OPTIONS
sudo -n "$IP" route add default dev "${DEV}" table 200 2>/dev/null || exit 1
ip rule add from "$1" table 200; ip rule add from $(hostname -I) table 200
echo ip rule add from 10.11.0.0/24 table 200
"#,
        )],
    ),
    (
        "abbreviations_of_ip",
        &[(
            "short.sh",
            "ip ru a from 10.8/16 ta 200 prio 100\n\
             ip ru add pref 110 from 10.9.0.0/255.255.0.0 tab 0xc8\n\
             ip -f inet6 rul ad order 120 from 2001:db8::/48 lookup 200\n\
             ip -6 -force r a default dev wg0 tab 200\n\
             ip r rep default dev wg0 tab 200 met 10\n\
             ip r a unr default tab 200 metric 4000\n\
             ip r a throw 192.168.0.0/16 tab 200\n\
             ip a a 10.0.0.1/24 dev lan0\n",
        )],
    ),
    (
        "functions_and_loops",
        &[(
            "loops.sh",
            r#"run() { echo "+ $*"; "$@"; }
send() {
    for net in $2; do
        run ip rule add from $net table "$1"
    done
}
for number in 1 2; do
    ip route add default dev "wg$number" table 20$number
done
case "$1" in
start)
    send 201 "10.1.0.0/16 10.3.0.0/16"
    send 202 10.2.0.0/16
    ;;
stop)
    ip rule del from 10.1.0.0/16 table 201
    ;;
esac
"#,
        )],
    ),
    (
        "values_that_are_not_known",
        &[(
            "conditions.sh",
            r#"TABLE=200
if [ -e /etc/backup ]; then TABLE=201; fi
ip rule add from 10.1.0.0/16 table $TABLE
[ -n "$NET" ] || NET=10.2.0.0/16
ip rule add from $NET table 200
. /etc/default/router
while read net; do ip rule add from $net table 200; done </etc/nets
PREF=100
ip rule add from 10.8.0.0/16 table 200 pref $((PREF++))
ip rule add from 10.9.0.0/16 table 200 pref $PREF
generate | ip -batch -
for ((i = 1; i < 3; i++)); do ip rule add from 10.$i.0.0/16 table 200; done
function more { ip rule add from $1 table 200; }
ip route add default dev wg0 table 200
ip rule add from 10.3.0.0/16 table 200
ssh other "ip rule add from 10.4.0.0/16 table 200"
ip netns exec blue ip rule add from 10.5.0.0/16 table 200
ip -n blue rule add from 10.6.0.0/16 table 200
route add default gw 192.0.2.1 dev net0
echo 'ip rule add from 10.7.0.0/16 table 200' >> /etc/rc.local
"#,
        )],
    ),
    (
        "scripts_in_scripts",
        &[(
            "nested.sh",
            r#"sh -c 'ip rule add from 10.1.0.0/16 table 200; ip rule add from 10.2.0.0/16 table 200'
NET=10.3.0.0/16
sudo bash -c "ip rule add from $NET table 200"
eval "ip rule add from $NET to 10.9.0.0/16 table 200"
ip -batch - <<EOF
rule add from 10.4.0.0/16 table 200  # in a batch
route add default dev wg0 table 200
EOF
echo "rule add from 10.5.0.0/16 table 200" | ip -b -
cat <<'EOF' | sh
ip rule add from 10.6.0.0/16 table 200
EOF
ip -6 -b /etc/rules6
ip -b /etc/lost
"#,
        )],
    ),
    (
        "a_batch_file",
        &[(
            "rules.batch",
            "route add default via 10.9.0.1 dev vx0 table 7\nrule add from 10.1.0.0/16 lookup 7\nlink set vx0 up\n",
        )],
    ),
    (
        "names_of_tables",
        &[
            (
                "names.sh",
                "grep -q wg /etc/iproute2/rt_tables || echo '200 wg' | sudo tee -a /etc/iproute2/rt_tables\n\
                 printf '%s\\t%s\\n' 201 office >> /etc/iproute2/rt_tables\n\
                 ip route add default dev wg0 table wg\n\
                 ip route add default dev wg1 table office\n\
                 ip route add default dev wg2 table home\n\
                 ip rule add from 10.1.0.0/16 table wg\n\
                 ip rule add from 10.2.0.0/16 table office\n\
                 ip rule add from 10.3.0.0/16 table home\n\
                 ip rule add from 10.4.0.0/16 table other\n",
            ),
            ("/etc/iproute2/rt_tables.d/home.conf", "# more names\n202 home\n"),
        ],
    ),
    (
        "ifupdown",
        &[(
            "/etc/network/interfaces",
            "auto lo eth0 eth1\n\
             iface lo inet loopback\n\
             iface eth0 inet static\n    address 192.0.2.2\n    netmask 255.255.255.0\n    gateway 192.0.2.1\n\
             iface eth1 inet static\n    address 203.0.113.3/29\n\
             \x20   up ip route add default via 203.0.113.6 dev $IFACE table 100\n\
             \x20   post-up ip rule add from ${IF_ADDRESS%/*} table 100\n\
             \x20   post-up ip rule add from 203.0.113.3 \\\n        table 100\n\
             \x20   down ip rule del from 203.0.113.3 table 100\n\
             iface lan0 inet static\n    address 10.1.0.1/24\n\
             source /etc/network/interfaces.d/*\n",
        )],
    ),
    (
        "wg_quick",
        &[(
            "/etc/wireguard/wg0.conf",
            "[Interface]\nPrivateKey = x=\nAddress = 10.9.0.2/24\nTable = off\n\
             PostUp = ip route add default dev %i table 200; ip rule add from 10.8.0.0/24 table 200\n\
             PostDown = ip rule del from 10.8.0.0/24 table 200\n\
             [Peer]\nPublicKey = y=\nAllowedIPs = 0.0.0.0/0\n",
        )],
    ),
    (
        "networkd",
        &[(
            "/etc/systemd/network/20-wg0.network",
            "[Match]\nName=wg0\n\n[Route]\nTable=200\nDestination=::/0\n\n[RoutingPolicyRule]\nFrom=2001:db8::/48\nTable=200\n\
             Priority=1000\n\n[RoutingPolicyRule]\nFrom=2001:db8:1::/48\nTable=200\nTypeOfService=8\n",
        )],
    ),
    (
        "rhel",
        &[
            ("/etc/sysconfig/network-scripts/rule-eth1", "# the second provider\nfrom 203.0.113.3 table 100\n"),
            ("/etc/sysconfig/network-scripts/route-eth1", "default via 203.0.113.6 dev eth1 table 100\n"),
            (
                "/etc/sysconfig/network-scripts/route-eth2",
                "ADDRESS0=10.7.0.0\nNETMASK0=255.255.0.0\nGATEWAY0=10.1.0.9\n",
            ),
            ("/etc/sysconfig/network-scripts/ifcfg-eth1", "DEVICE=eth1\nIPADDR=203.0.113.3\n"),
        ],
    ),
    (
        "a_unit_of_systemd",
        &[(
            "rules.service",
            "[Unit]\nDescription=Rules\n[Service]\nType=oneshot\nExecStartPre=-/sbin/ip rule del from 10.1.0.0/16\n\
             ExecStart=/sbin/ip route add default dev wg0 table 200\n\
             ExecStart=/bin/sh -c 'ip rule add from 10.1.0.0/16 table 200'\n",
        )],
    ),
    (
        "files_that_are_not_read",
        &[
            ("/etc/netplan/01.yaml", "network:\n  version: 2\n  ethernets: {}\n"),
            ("vpn.nmconnection", "[connection]\nid=vpn\n[ipv4]\nroute1=10.0.0.0/8\n"),
            ("/etc/config/network", "config rule\n    option src '10.1.0.0/16'\n    option lookup '200'\n"),
            ("empty.sh", "#!/bin/sh\nip link set wg0 up\n"),
            ("good.sh", "ip route add default dev wg0 table 200\nip rule add from 10.1.0.0/16 table 200\n"),
        ],
    ),
    (
        "two_gateways_on_one_device",
        &[(
            "two.sh",
            "ip rule add from 10.1.0.2 table 1 pref 10\n\
             ip rule add from 10.1.0.3 table 2 pref 11\n\
             ip route add default via 10.1.0.251 dev lan0 table 1\n\
             ip route add default via 10.1.0.252 dev lan0 table 2\n",
        )],
    ),
    (
        "two_providers_as_in_the_howto",
        &[(
            "howto.sh",
            "IF1=isp1; IF2=isp2; IP1=192.0.2.2; IP2=198.51.100.2; P1=192.0.2.1; P2=198.51.100.1\n\
             P1_NET=192.0.2.0/24; P2_NET=198.51.100.0/24\n\
             ip route add $P1_NET dev $IF1 src $IP1 table 101\n\
             ip route add default via $P1 table 101\n\
             ip route add $P2_NET dev $IF2 src $IP2 table 102\n\
             ip route add default via $P2 table 102\n\
             ip route add $P1_NET dev $IF1 src $IP1\n\
             ip route add $P2_NET dev $IF2 src $IP2\n\
             ip route add default via $P1\n\
             ip route add 10.1.0.0/24 dev lan0\n\
             ip rule add from $IP1 table 101\n\
             ip rule add from $IP2 table 102\n",
        )],
    ),
    (
        "what_a_configuration_cannot_say",
        &[(
            "rest.sh",
            "ip route add default dev wg0 table 200\n\
             ip route add default dev wg1 table 200 metric 20 mtu 1300\n\
             ip route add default dev wg1 table 200\n\
             ip route add 10.77.0.0/16 dev eth7 table 200\n\
             ip rule add from 10.1.0.0/16 table 200\n\
             ip rule add from 10.1.5.0/24 table 200 pref 32766\n\
             ip rule add fwmark 1 from 10.2.0.0/16 table 200\n\
             ip rule add from all table 200\n\
             ip rule add from 10.1.7.0/24 table main\n\
             ip rule add from 0.0.0.0/1 table 200\n\
             ip rule add from 2001:db8::/48 table 200\n\
             ip -4 route add default via inet6 fe80::1 dev net1 table 201\n\
             ip rule add from 10.3.0.0/16 table 201\n\
             ip route add default table 202 nexthop via 192.0.2.1 dev a nexthop via 192.0.2.2 dev b\n\
             ip rule add from 10.4.0.0/16 table 202\n\
             ip route add default dev a-name-that-is-too-long table 203\n\
             ip rule add from 10.5.0.0/16 table 203\n\
             ip rule add from 10.6.0.0/16 table 200 frobnicate\n",
        )],
    ),
];

#[test]
fn examples() {
    let read = |path: &str| {
        (path == "/etc/rules6")
            .then(|| "route add default dev wg0 table 200\nrule add from 2001:db8::/48 table 200\n".to_owned())
    };
    for (name, files) in EXAMPLES {
        let files: Vec<File<'_>> = files.iter().map(|(path, text)| File { path, text }).collect();
        let draft = draft(&parse(&files, BTreeMap::new(), &read));
        let written = draft.write();
        Config::parse("t.toml", &written).unwrap_or_else(|error| panic!("{name}:\n{written}\n{error}"));
        let fits = |line: &str| line.chars().count() <= 80 || line.starts_with("#   ip ");
        assert!(written.lines().all(fits), "{name}:\n{written}");
        let mut shown = String::new();
        for File { path, text } in &files {
            let _infallible = writeln!(shown, "==> {path} <==\n{text}");
        }
        // The comments at the beginning are the same in all.
        let (_, body) = written.split_once("[interfaces]").unwrap_or_default();
        let _infallible = write!(shown, "==> tunroute import <==\n[interfaces]{body}");
        insta::assert_snapshot!(*name, shown);
    }
}
