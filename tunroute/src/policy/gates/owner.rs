//! Other programs that make rules, recognised by the marks, tables and priorities that they use.

use std::ops::RangeInclusive;

use crate::policy::net::Family;

/// A program that needs the rules that it makes: it puts back one that is deleted, or does not work without it.
struct Owner {
    name: &'static str,
    /// What to configure besides a band ahead of its rules.
    configure: &'static str,
    /// Parts of a rule's text, with a space at its end, that no other program writes.
    signs: &'static [&'static str],
    /// Priorities at which a rule with this part is one of its rules.
    places: &'static [(RangeInclusive<u32>, &'static str)],
}

/// Rules of several programs ask the main table so, for everything but its default route.
const BUT_DEFAULT: &str = "lookup main suppress_prefixlength 0 ";

/// The first one that matches is meant.
const OWNERS: [Owner; 10] = [
    // wgengine/router/osrouter/router_linux.go: 5210 to 5270, or 1310 to 1370 beside mwan3.
    Owner {
        name: "Tailscale",
        configure: "for its peers, write \"100.64.0.0/10\" and \"fd7a:115c:a1e0::/48\" to `exempt`",
        signs: &["fwmark 0x80000/0xff0000 ", "lookup 52 "],
        places: &[],
    },
    // client/internal/routemanager/systemops/systemops_linux.go: 105 (100 until 2025) and 110.
    Owner {
        name: "NetBird",
        configure: "with NB_USE_LEGACY_ROUTING=true in its environment it makes no rules",
        signs: &["fwmark 0x1bd00 ", "lookup 7120 "],
        places: &[(100..=105, BUT_DEFAULT)],
    },
    Owner {
        name: "Mullvad",
        configure: "a WireGuard device of your own needs no such rules",
        signs: &["fwmark 0x6d6f6c65 ", "lookup 1836018789 "],
        places: &[],
    },
    Owner {
        name: "Cloudflare WARP",
        configure: "to reach its networks, write them to `exempt`",
        signs: &["fwmark 0x100cf ", "lookup 65743 "],
        places: &[],
    },
    // net/mwan3/files/lib/mwan3/mwan3.sh: 1000, 2000 and 3000, and the interface's number.
    Owner {
        name: "mwan3",
        configure: "take the policies' sources out of its configuration, as only one of the two can decide",
        signs: &["/0x3f00 "],
        places: &[(1001..=1060, "iif ")],
    },
    // sing-tun, as sing-box and mihomo use it.
    Owner {
        name: "sing-box or mihomo",
        configure: "with `auto_route` off it makes no rules",
        signs: &["lookup 2022 "],
        places: &[(9000..=9010, "")],
    },
    Owner {
        name: "Cilium",
        configure: "write the networks of pods and services to `exempt`",
        signs: &["fwmark 0x200/0xf00 ", "fwmark 0xa00/0xf00 ", "lookup 2004 ", "lookup 2005 "],
        places: &[],
    },
    // docs/cni-proposal.md of amazon-vpc-cni-k8s
    Owner {
        name: "the Amazon VPC CNI",
        configure: "write the networks of the VPC to `exempt`",
        signs: &["fwmark 0x80/0x80 "],
        places: &[(512..=512, "lookup main "), (1025..=1025, "lookup main "), (1536..=1536, "from ")],
    },
    // `RTPROT_ZEBRA` in `include/uapi/linux/rtnetlink.h`
    Owner { name: "FRR", configure: "its `pbr-map` says what it is for", signs: &["protocol 11 "], places: &[] },
    // contrib/wg-quick/linux.bash: one number is mark and table, 51820 or the next that is free.
    Owner {
        name: "wg-quick",
        configure: "if tunroute is to route by its device, write `Table = off` in its configuration",
        signs: &["fwmark 0xca6c ", "lookup 51820 ", "fwmark 0xca6d ", "lookup 51821 "],
        places: &[(0..=u32::MAX, BUT_DEFAULT)],
    },
];

fn owner_of(text: &str, priority: u32) -> Option<&'static Owner> {
    const ALL: &[Owner] = &OWNERS;
    let text = format!("{text} ");
    let placed = |owner: &Owner| {
        owner.places.iter().any(|(priorities, part)| priorities.contains(&priority) && text.contains(part))
    };
    ALL.iter().find(|owner| owner.signs.iter().any(|sign| text.contains(sign)) || placed(owner))
}

/// The name of the program that needs a rule, by the rule's text in `ip rule` syntax and its priority.
#[must_use]
pub fn owner(text: &str, priority: u32) -> Option<&'static str> {
    owner_of(text, priority).map(|owner| owner.name)
}

/// What to do about a rule of others that is asked first. `ahead` is the band to write, if there is room for one.
#[must_use]
pub fn advice(family: Family, priority: u32, text: &str, ahead: Option<&str>) -> String {
    let ip = match family {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    };
    match (owner_of(text, priority), ahead) {
        (Some(Owner { name, configure, .. }), Some(ahead)) => {
            format!("leave it, as {name} needs it, and write {ahead}; {configure}")
        }
        (Some(Owner { name, configure, .. }), None) => {
            format!("leave it, as {name} needs it; there is no room for a `band` ahead of it; {configure}")
        }
        (None, Some(ahead)) => format!("write {ahead}; or, if the rule is not needed, {ip} rule del {text}"),
        (None, None) => format!("there is no room for a `band` ahead of it; if it is not needed, {ip} rule del {text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_attributed_to_the_program_that_needs_them() {
        for (priority, text, name) in [
            (5210, "from all fwmark 0x80000/0xff0000 lookup main", Some("Tailscale")),
            (5230, "from all fwmark 0x80000/0xff0000 lookup default", Some("Tailscale")),
            (5250, "from all fwmark 0x80000/0xff0000 unreachable", Some("Tailscale")),
            (5270, "from all lookup 52", Some("Tailscale")),
            (1370, "from all lookup 52", Some("Tailscale")),
            (5270, "from all lookup 520", None),
            (105, "from all lookup main suppress_prefixlength 0", Some("NetBird")),
            (100, "from all lookup main suppress_prefixlength 0", Some("NetBird")),
            (110, "not from all fwmark 0x1bd00 lookup 7120", Some("NetBird")),
            (32764, "from all lookup main suppress_prefixlength 0", Some("wg-quick")),
            (32765, "not from all fwmark 0xca6c lookup 51820", Some("wg-quick")),
            (500, "not from all fwmark 0x6d6f6c65 lookup 1836018789", Some("Mullvad")),
            (500, "not from all fwmark 0x100cf lookup 65743", Some("Cloudflare WARP")),
            (1001, "from all iif eth1 lookup 1", Some("mwan3")),
            (2001, "from all fwmark 0x100/0x3f00 lookup 1", Some("mwan3")),
            (2061, "from all fwmark 0x3d00/0x3f00 blackhole", Some("mwan3")),
            (3001, "from all fwmark 0x100/0x3f00 unreachable", Some("mwan3")),
            (9001, "not from all dport 53-53 lookup main suppress_prefixlength 0", Some("sing-box or mihomo")),
            (9010, "from all nop", Some("sing-box or mihomo")),
            (9, "from all fwmark 0x200/0xf00 lookup 2004", Some("Cilium")),
            (512, "from all to 10.80.36.229 lookup main", Some("the Amazon VPC CNI")),
            (1536, "from 10.80.40.40 to 10.80.0.0/16 lookup 2", Some("the Amazon VPC CNI")),
            (300, "from 10.0.0.0/8 lookup 10000 pref 300 protocol 11", Some("FRR")),
            (100, "from 10.0.0.0/8 lookup 7 pref 100", None),
        ] {
            assert_eq!(owner(text, priority), name, "{priority}: {text}");
            for ahead in [None, Some("`band = 1002`, which is ahead of it")] {
                let advice = advice(Family::V6, priority, text, ahead);
                assert_eq!(advice.contains("ip -6 rule del"), name.is_none(), "{advice}");
            }
        }
    }
}
