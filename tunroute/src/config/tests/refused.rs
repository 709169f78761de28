//! Each bad input: the place («…», and ‹…› for a second one), the message and the help.

use std::fmt::Write as _;

use super::{Config, from, only_error, policy, probe, refuse, tunnel};

/// Takes the marks out of a text: what is left, and for each marked place its line, column and text.
fn unmark(marked: &str, open: char, close: char) -> Option<((usize, usize), String)> {
    let text: String = marked.chars().filter(|c| !"«»‹›".contains(*c) || *c == open || *c == close).collect();
    let start = text.find(open)?;
    let inside = text.get(start + open.len_utf8()..text.find(close)?)?;
    let before = text.get(..start)?;
    let column = before.rsplit('\n').next()?.chars().count() + 1;
    Some(((before.matches('\n').count() + 1, column), inside.to_owned()))
}

/// Refused with one error at the marked place that says all this.
#[track_caller]
fn check(marked: &str, message: &str, help: &str) {
    let text: String = marked.chars().filter(|c| !"«»‹›".contains(*c)).collect();
    let error = refuse(&text);
    let problem = only_error(&error);
    let (position, underlined) = unmark(marked, '«', '»').expect("a marked place");
    assert_eq!(problem.position(), Some(position), "{marked}\n{error}");
    let mut expected = vec![underlined];
    expected.extend(unmark(marked, '‹', '›').map(|(_, underlined)| underlined));
    assert_eq!(problem.underlined().collect::<Vec<_>>(), expected, "{marked}\n{error}");
    assert!(problem.message().contains(message), "{:?} does not say {message:?}", problem.message());
    assert!(problem.help().contains(help), "{:?} does not say {help:?}", problem.help());
    assert!(problem.render(false).contains(&format!("[t.toml:{}:{}]", position.0, position.1)));
}

#[test]
fn prefixes() {
    for (value, message, help) in [
        ("2a02::/129", "at most 128 bits", "\"2a02::/128\""),
        ("10.0.0.0/33", "at most 32 bits", "\"10.0.0.0/32\" or \"10.0.0.0\""),
        ("10.0.0.0/300", "at most 32 bits", "\"10.0.0.0\""),
        ("2a02::1/48", "bits set beyond its first 48", "\"2a02::/48\" for the whole prefix or \"2a02::1\""),
        ("10.1.2.3/8", "bits set beyond its first 8", "\"10.0.0.0/8\""),
        ("010.0.0.1", "leading zeros", "\"10.0.0.1\""),
        ("10.00.0.0/8", "leading zeros", "\"10.0.0.0\""),
        ("10.0.0.0/08", "leading zero", "\"10.0.0.0/8\""),
        ("10.0.0.0/255.0.0.0", "netmask", "\"10.0.0.0/8\""),
        ("10.0.0.0/", "no prefix length", "0 to 32"),
        ("10.0.0.0/+8", "no prefix length", "0 to 32"),
        ("2a02::/x", "no prefix length", "0 to 128"),
        ("2a02::/32/48", "no prefix length", "0 to 128"),
        ("fe80::1%eth0", "has a zone, `%eth0`", "`fe80::1`"),
        ("fe80::1%eth0/64", "has a zone", "`fe80::1`"),
        ("::ffff:192.0.2.1", "IPv4-mapped form of 192.0.2.1,", "\"192.0.2.1\""),
        ("::ffff:192.0.2.0/120", "IPv4-mapped form of 192.0.2.0/24", "\"192.0.2.0/24\""),
        ("[2a02::1]", "not an address", "\"2a02::1\""),
        (" 2a02::1", "not an address", "\"2a02::1\""),
        ("10.0.0", "not an address", "such as"),
        ("example.com", "not an address", "names are not looked up"),
        ("", "not an address", "such as"),
        ("ff02::/16", "is multicast", "remove it"),
        ("224.0.0.0/4", "is multicast", "remove it"),
        ("127.0.0.1", "is loopback", "remove it"),
        ("::1", "is loopback", "remove it"),
        ("169.254.1.0/24", "is link-local", "remove it"),
        ("fe80::/10", "is link-local", "remove it"),
        ("0.0.0.0", "is unspecified", "remove it"),
        ("::", "is unspecified", "remove it"),
        ("255.255.255.255", "is broadcast", "remove it"),
        ("0.0.0.0/0", "takes every packet", "allow-default = true"),
        ("::/0", "takes every packet", "allow-default = true"),
        ("0.0.0.0/1", "covers the unspecified sources 0.0.0.0/8", "allow-default = true"),
        ("8000::/1", "covers the link-local sources fe80::/10", "allow-default = true"),
        ("240.0.0.0/4", "covers the broadcast sources", "allow-default = true"),
    ] {
        check(&from(&format!("[\"2a02::8\", «\"{value}\"»]"), ""), message, help);
    }
    // Even where every source may be taken, one that cannot exist may not.
    check(&from("«\"ff02::/16\"»", "allow-default = true"), "is multicast", "remove it");
}

#[test]
fn sources_twice() {
    let two = |first: &str, second: &str| {
        from(first, &format!("[[policy]]\nname = \"q\"\nvia = \"t\"\nfrom = [\"2a02:1::/32\", {second}]"))
    };
    check(&two("‹\"2a02::1\"›", "«\"2a02::1/128\"»"), "2a02::1/128 is already in the policy `p`", "keep it in the one");
    check(&from("[‹\"10.0.0.0/8\"›, \"10.0.0.0/9\", «\"10.0.0.0/8\"»]", ""), "twice in one policy", "remove one");
    check(&policy("exempt = [‹\"10.0.0.0/8\"›, «\"10.0.0.0/8\"»]"), "exempt twice", "remove one");
}

#[test]
fn a_gateway_of_another_family() {
    let text = "[tunnel.t]\nvia = [\"192.0.2.1\", «\"inet6 fe80::1\"»]\n[[policy]]\nname = \"p\"\nvia = \"t\"\nfrom = \"10.0.0.1\"\n";
    check(text, "an IPv6 gateway for IPv4 (RFC 8950), which tunroute does not support", "write \"fe80::1\"");
}

#[test]
fn followed_interfaces() {
    for (value, message, help) in [
        ("@", "a device name is empty", "\"@lan0\""),
        ("@a/b", "contains `/`", "\"@lan0\""),
        ("@sixteen-bytes-xx", "has 16 bytes", "\"@lan0\""),
        ("@br-*0", "`*` that is not at its end", "\"@lan0\""),
        ("@@lan0", "one `@` too many", "\"@lan0\""),
        ("@lo", "no network is on the link at `lo`", "\"@lan0\""),
        ("@lan0 in", "contains a space", "\"@lan0 in 2001:db8:a::/48\""),
        ("@lan0 in net0", "is not an address", "write an address"),
        ("@lan0 in fe80::/64", "is link-local and cannot be a source", "remove it"),
        // Meant, perhaps.
        ("lan0", "not an address", "write \"@lan0\" for the prefixes"),
    ] {
        check(&from(&format!("[\"2a02::8\", «\"{value}\"»]"), ""), message, help);
    }
    let two = "[[policy]]\nname = \"q\"\nvia = \"t\"\nfrom = [\"@lan1\", «\"@lan0\"»]";
    check(&from("‹\"@lan0\"›", two), "@lan0 is already in the policy `p`", "keep it in the one");
    let range = "[‹\"@lan0 in 10.0.0.0/8\"›, «\"@lan0 in 10.0.0.0/8\"»]";
    check(&from(range, ""), "@lan0 in 10.0.0.0/8 twice in one policy", "remove one");
    check(&from("[‹\"@br-*\"›, «\"@br-*\"»]", ""), "@br-* twice in one policy", "remove one");
}

#[test]
fn nesting() {
    // Prefixes of this many policies, each inside the one before; in the order of the file the longest come first.
    let nested = |levels: u8| {
        let mut text = "[tunnel.t]\n".to_owned();
        for level in (1..=levels).rev() {
            let (open, close) = if level == 9 { ("«", "»") } else { ("", "") };
            let from = format!("{open}\"2a02::/{}\"{close}", 30 + level);
            writeln!(text, "[[policy]]\nname = \"p{level}\"\nvia = \"t\"\nfrom = {from}").unwrap();
        }
        text
    };
    super::take(&nested(8));
    check(&nested(9), "2a02::/39 is inside 8 prefixes of other policies", "at most 8 IPv6 prefixes");
    // Prefixes of one policy around one another are one level.
    let same: Vec<String> = (20..60).map(|length| format!("\"2a02::/{length}\"")).collect();
    super::take(&from(&format!("[{}]", same.join(", ")), ""));
}

#[test]
fn device_names() {
    for (name, message) in [
        ("", "is empty"),
        (".", "is no device name"),
        ("..", "is no device name"),
        ("sixteen-bytes-xx", "has 16 bytes, a device name at most 15"),
        ("größer-als-15b", "has 16 bytes"),
        ("a/b", "contains `/`"),
        ("a:b", "contains `:`"),
        ("a%d", "contains `%`"),
        ("a b", "contains a space"),
        ("a\\nb", "contains a space or control character"),
        ("a\\u0000b", "contains a space or control character"),
        ("à", "contains a space"),
        ("a*", "contains `*`"),
    ] {
        let declared =
            format!("[tunnel.«\"{name}\"»]\n[[policy]]\nname = \"p\"\nvia = \"{name}\"\nfrom = \"2a02::1\"\n");
        check(&declared, message, "write");
        if name != "a*" {
            check(&format!("[interfaces]\nuplink = [\"net0\", «\"{name}\"»]"), message, "`ip link`");
        }
    }
    check("[interfaces]\ningress = «\"br-*0\"»", "`*` that is not at its end", "\"br-*\"");
    check("[interfaces]\ningress = «\"**\"»", "`*` that is not at its end", "\"*\"");
    check("[interfaces]\ningress = «\"a/*\"»", "contains `/`", "");
    let lo = "[tunnel.«lo»]\n[[policy]]\nname = \"p\"\nvia = \"lo\"\nfrom = \"2a02::1\"\n";
    check(lo, "leads nowhere", "tunnel's device");
}

#[test]
fn segment_sizes() {
    for (value, message, help) in [
        ("87", "87 bytes is out of range", "\"auto\", or a number from 88 to 65495"),
        ("65496", "65496 bytes is out of range", "\"auto\""),
        ("\"1400\"", "must be \"auto\" or a number", ""),
        ("true", "must be", ""),
    ] {
        check(&tunnel(&format!("mss = «{value}»")), message, help);
    }
}

#[test]
fn roles() {
    let head = "[interfaces]\n";
    let with = |line: &str| format!("{head}{line}\n{}", tunnel("").replace("tunnel.t", "tunnel.‹t›"));
    check(&with("uplink = [\"net0\", «\"t\"»]"), "`t` is also an uplink interface", "`uplink`");
    check(&with("ingress = [«\"t*\"»]"), "`t` is also an ingress interface, by `t*`", "`ingress`");
    check(&with("ingress = «\"*\"»"), "by `*`", "does not match");
    super::take(&with("ingress = [\"s*\", \"tt\", \"tt*\", \"a\"]").replace(['‹', '›'], ""));
}

#[test]
fn references() {
    let via = |via: &str| format!("[tunnel.sixxs0]\n[[policy]]\nname = \"p\"\nfrom = \"2a02::1\"\nvia = {via}\n");
    check(&via("[\"sixxs0\", «\"sixxs1\"»]"), "no tunnel `sixxs1`", "did you mean \"sixxs0\"?");
    check(&via("«\"wg.0\"»"), "no tunnel `wg.0`", "[tunnel.\"wg.0\"]");
    check(&via("[‹\"sixxs0\"›, «\"sixxs0\"»]"), "`sixxs0` twice in one `via`", "remove");
    check(&via("«[]»"), "`via` is empty", "at least one");
    check(&from("«[]»", ""), "`from` is empty", "at least one");
}

#[test]
fn policy_names() {
    let named = |name: &str| format!("[tunnel.t]\n[[policy]]\nname = {name}\nvia = \"t\"\nfrom = \"2a02::1\"\n");
    let long = "x".repeat(65);
    check(&named("«\"\"»"), "is empty", "1 to 64");
    check(&named("«\"a b\"»"), "contains ` `", "A–Z");
    check(&named("«\"a\\u001bb\"»"), "contains `?`", "A–Z");
    check(&named(&format!("«\"{long}\"»")), "has 65 bytes", "1 to 64");
    let second = "[[policy]]\nname = «\"p\"»\nvia = \"t\"\nfrom = \"2a02::2\"";
    check(&policy(second).replacen("\"p\"", "‹\"p\"›", 1), "second policy with the name `p`", "another name");
    let many = |count: usize| {
        (0..count).fold("[tunnel.t]\n".to_owned(), |text, index| {
            let header = if index == 1024 { "«[[policy]]»" } else { "[[policy]]" };
            text + &format!("{header}\nname = \"p{index}\"\nvia = \"t\"\nfrom = \"2a02::{index:x}\"\n")
        })
    };
    super::take(&many(1024));
    check(&many(1025), "1025 policies are too many", "at most 1024");
}

#[test]
fn tables() {
    for (number, name) in [(0, "unspec"), (253, "default"), (254, "main"), (255, "local")] {
        check(&tunnel(&format!("table = «{number}»")), name, "such as 200");
        check(&policy(&format!("table = «{number}»")), name, "such as 200");
    }
    check(&tunnel("table = «-1»"), "out of range", "table = 200");
    check(&tunnel("table = «4294967296»"), "out of range", "0 to 4294967295");
    let second = "[[policy]]\nname = \"q\"\nvia = \"t\"\nfrom = \"2a02::2\"\n";
    let two = policy(&format!("table = ‹7›\n{second}table = «7»"));
    check(&two, "second policy with table 7", "another number");
    let tunnels = format!("{}[tunnel.u]\ntable = «7»\n", tunnel("table = ‹7›"));
    check(&tunnels, "second tunnel with table 7", "another number");
    // The second policy's number is that of the tunnel that the first one takes its table from.
    let taken = format!("{}{second}table = ‹7›", tunnel("table = «7»"));
    check(&taken, "table 7 of the tunnel `t` is another policy's", "another number");
    // The policy that takes its table from the tunnel may say so.
    super::take(&format!("{}table = 7\n[tunnel.t]\ntable = 7", policy("").replacen("[tunnel.t]\n", "", 1)));
}

#[test]
fn policies_that_leave_their_sources_to_the_main_table() {
    let left = |text: &str| {
        format!(
            "[tunnel.t]\n[[policy]]\nname = \"a\"\nfrom = \"10.0.0.0/8\"\nvia = \"t\"\n[[policy]]\nname = \"b\"\nfrom = \"10.0.0.1\"\n{text}"
        )
    };
    assert!(super::take(&left("via = \"main\"")).config.policies[1].main);
    check(&left("via = [«\"main\"», ‹\"t\"›]"), "beside tunnels", "alone");
    check(&left("via = \"main\"\non-down = «\"next\"»"), "`on-down` in a policy", "remove it");
    check(&left("via = \"main\"\nexempt = «[\"connected\"]»"), "`exempt` in a policy", "remove it");
    check(&left("via = \"main\"\ntable = «7»"), "`table` in a policy", "remove it");
    check("[tunnel.«main»]", "cannot have the name `main`", "rename");
}

#[test]
fn bands() {
    for (band, message) in [
        ("0", "include 0, the kernel's rule `local`"),
        ("872", "include 1000, the kernel's rule `l3mdev`"),
        ("1002", "include 1000"),
        ("32638", "include 32766, the kernel's rule `main`"),
        ("32769", "include 32767, the kernel's rule `default`"),
        ("4294967168", "end beyond the last one"),
    ] {
        check(&format!("band = «{band}»"), message, "20000");
    }
    for band in [3, 871, 1003, 32637] {
        assert_eq!(super::take(&format!("band = {band}")).warnings.len(), 0);
    }
    for band in [32770, 4_294_967_167_u32] {
        let warnings = super::take(&format!("band = {band}")).warnings;
        assert!(warnings.first().is_some_and(|warning| warning.message().contains("after the main table")), "{band}");
    }
}

#[test]
fn gateways() {
    for (via, message, help) in [
        ("«\"10.9.0.0/24\"»", "not an address", "such as"),
        ("«\"0.0.0.0\"»", "the unspecified address", "one host"),
        ("«\"ff02::1\"»", "the address of many hosts", "one host"),
        ("«\"127.0.0.1\"»", "an address of this host", "one host"),
        ("«\"fe80::1%t\"»", "has a zone", "`fe80::1`"),
        ("«\"::ffff:10.0.0.1\"»", "IPv4-mapped", "\"10.0.0.1\""),
        ("[‹\"10.0.0.1\"›, «\"10.0.0.2\"»]", "a second gateway for IPv4", "at most one"),
        ("«[]»", "`via` is empty", "fe80::1"),
    ] {
        check(&tunnel(&format!("via = {via}")), message, help);
    }
}

#[test]
fn commands() {
    for (command, message, help) in [
        ("«[]»", "is empty", "the program and its arguments"),
        ("«[\"\", \"x\"]»", "an empty program", "name the program"),
        ("«[\"bin/aiccu\"]»", "is a relative path", "bare name"),
        ("«[\"aiccu start\"]»", "contains a space", "[\"aiccu\", \"start\", …]"),
        ("«[\"aiccu\", \"a\\u0000b\"]»", "a zero character", "remove it"),
        ("«\"aiccu start\"»", "must be a list", "[\"aiccu\", \"start\"]"),
        ("[\"aiccu\", «1»]", "must be a list of strings, not an integer", "up = ["),
    ] {
        check(&tunnel(&format!("up = {command}")), message, help);
    }
}

#[test]
fn start_limits() {
    check(&tunnel("start-limit = { burst = «0» }"), "`burst` is 0", "1 or more");
    check(&tunnel("start-limit = { interval = «\"0s\"» }"), "`interval` is zero", "\"60s\"");
    check(&tunnel("start-limit = «4»"), "must be a table, not an integer", "burst = 4");
}

#[test]
fn durations() {
    for (interval, message, help) in [
        ("\"60\"", "has no unit", "\"60s\""),
        ("60", "`interval` has no unit", "write \"60s\" for seconds or \"60ms\""),
        ("\"60 parsecs\"", "`parsecs` is no unit", "\"500ms\""),
        ("\"\"", "is no duration", "\"500ms\""),
        ("\"-5s\"", "is no duration", "\"500ms\""),
        ("\"s\"", "is no duration", "\"500ms\""),
        ("\"31d\"", "is too long", "\"30d\""),
        ("\"18446744073709551615s 1000ms\"", "is too long", "\"500ms\""),
        ("5.0", "must be a duration with its unit, not a float", "\"60s\""),
    ] {
        check(&tunnel(&format!("start-limit = {{ interval = «{interval}» }}")), message, help);
    }
}

#[test]
fn probes() {
    for (fields, message, help) in [
        ("target = «\"host:80\"»", "not an address", "\"[2001:db8::1]:443\""),
        ("target = «\"192.0.2.1:0\"»", "port 0", "for TCP"),
        ("target = «\"192.0.2.1:99999\"»", "not an address", "for TCP"),
        ("target = «\"[fe80::1%3]:80\"»", "has a zone", "without it"),
        ("target = «\"[::ffff:10.0.0.1]:80\"»", "IPv4-mapped", "10.0.0.1"),
        ("target = «\"ff02::1\"»", "cannot be a target", "one host"),
        ("target = \"192.0.2.1\", source = «\"2001:db8::1\"»", "the source is IPv6, the target IPv4", "leave `source`"),
        ("target = \"192.0.2.1\", source = «\"0.0.0.0\"»", "cannot be a source", "one host"),
        ("target = \"192.0.2.1\", interval = «\"9ms\"»", "`interval` is too short", "\"10ms\""),
        ("target = \"192.0.2.1\", timeout = «\"0s\"»", "`timeout` is zero", "\"1s\""),
        ("target = \"192.0.2.1\", timeout = «\"6s\"»", "(6s) is longer than `interval` (5s)", "at most \"5s\""),
        ("target = \"192.0.2.1\", fail = «0»", "`fail` is 0", "1 or more"),
        ("target = \"192.0.2.1\", rise = «0»", "`rise` is 0", "1 or more"),
        ("target = \"192.0.2.1\", hold_down = \"1s\"", "unknown key `hold_down`", "`hold-down`"),
    ] {
        let fields = fields.replace("hold_down", "«hold_down»");
        check(&probe(&fields), message.trim(), help);
    }
    check(&tunnel("probe = «{ interval = \"5s\" }»"), "probe without `target`", "target = \"2001:db8::1\"");
    check(&tunnel("probe = [{ target = \"192.0.2.1\" }, «7»]"), "a table or a list of tables", "probe = {");
}

#[test]
fn keys_and_types() {
    for (text, message, help) in [
        ("«bandd» = 1", "unknown key `bandd`", "did you mean `band`?"),
        ("«policies» = 1", "unknown key `policies`", "`tunnel` or `policy`"),
        ("band = «\"20000\"»", "must be an integer, not a string", "band = 20000"),
        ("band = «1.5»", "must be an integer, not a float", "band = 20000"),
        ("bypass-netfilter = «1»", "must be true or false, not an integer", "bypass-netfilter = true"),
        ("metrics = «9942»", "must be a string, not an integer", "metrics = \"127.0.0.1:9942\""),
        ("metrics = «\"127.0.0.1\"»", "`127.0.0.1` is no address with a port", "write \"127.0.0.1:9942\""),
        ("metrics = «\"[::1]:0\"»", "`[::1]:0` has no port", "write \"127.0.0.1:9942\""),
        ("metrics = «\"unix:metrics.sock\"»", "does not begin with `/`", "unix:/run/tunroute/metrics.sock"),
        ("datapath = «\"kernle\"»", "`kernle` is no value for `datapath`", "did you mean \"kernel\"?"),
        ("datapath = «\"none\"»", "`none` is no value", "`both`, `kernel`, `ebpf` or `shadow`"),
        ("interfaces = «1979-05-27»", "must be a table, not a datetime", "[interfaces]"),
        ("[interfaces]\nuplink = [«[\"a\"]»]", "must be a list of strings, not a list", "uplink = ["),
        ("[interfaces]\nuplink = «false»", "must be a string or a list of strings, not a boolean", "uplink = ["),
        ("«[policy]»\nname = \"p\"", "must be a list of tables, not a table", "two brackets"),
        ("policy = [«1»]", "a table or a list of tables", "two brackets"),
        ("«[[tunnel]]»\ntable = 1", "must be a table, not a list", "[tunnel.sixxs0]"),
        ("[tunnel]\n«table» = 7", "without the tunnel", "[tunnel.sixxs0]"),
        ("[tunnel]\nwg0 = «7»", "must be a table for each device, not an integer", "[tunnel.sixxs0]"),
        ("[tunnel.br0.«100»]", "unknown key `100`", "quote a device name"),
        ("band = 20000\n«band» = 20001", "`band` is already there", "remove one"),
        ("[tunnel.t]\n[tunnel.«t»]", "`t` is already there", "remove one"),
    ] {
        check(text, message, help);
    }
    check(&policy("«on_down» = \"next\""), "unknown key `on_down` in [[policy]]", "`on-down`");
    check(&policy("on-down = «\"drop\"»"), "`drop` is no value", "`unreachable`, `blackhole`, `prohibit` or `next`");
    check(&policy("exempt = «\"conected\"»"), "neither a prefix nor `connected`", "\"connected\"");
    check(&policy("exempt = [\"connected\", «\"routed\"»]"), "without uplinks", "[interfaces]");
    check(&policy("exempt = «\"0.0.0.0/0\"»"), "exempts every destination", "longer prefixes");
    check(&policy("exempt = «\"10.0.0.1/8\"»"), "bits set", "\"10.0.0.0/8\"");
    for missing in ["name", "via", "from"] {
        let whole = policy("").replace("[[policy]]", "«[[policy]]»");
        let lines: Vec<&str> = whole.lines().filter(|line| !line.starts_with(missing)).collect();
        check(&lines.join("\n"), &format!("without `{missing}`"), &format!("{missing} = "));
    }
}

#[test]
fn syntax() {
    check("datapath = «kernel»", "string values must be quoted", "write \"kernel\"");
    check("[tunnel.a«»", "unclosed table", "`]`");
    check("[tunnel.a«»\nband = 1", "unclosed table", "`]`");
    check("band = «»\n", "syntax error", "");
    check("# «»\u{1b}[2J\n", "invalid comment character", "printable");
    // What is not shown as it is takes as much room, so that what follows is underlined rightly.
    check("# \u{9b}\u{202e}é\n«bandd» = 1", "unknown key", "`band`");
    let deep = format!("a = {}", "[".repeat(10_000));
    assert!(!refuse(&deep).problems().is_empty());
}

#[test]
fn all_at_once() {
    let text = "band = 0\nuplink = 1\n[tunnel.a]\ntable = 0\n[[policy]]\nname = \"p\"\nfrom = [\"::/129\", \"x\"]\nvia = \"b\"";
    let error = refuse(text);
    let lines: Vec<usize> = error.problems().iter().filter_map(|problem| Some(problem.position()?.0)).collect();
    assert_eq!(lines, [1, 2, 4, 7, 7, 8]);
    assert_eq!(error.to_string().lines().count(), 6);
    // A slip in a generated list is not repeated without end.
    let many = refuse(&from(&format!("[{}]", vec!["\"x\""; 5000].join(",")), ""));
    assert_eq!((many.problems().len(), many.omitted()), (100, 4900));
    assert!(many.to_string().ends_with("… and 4900 more errors"));
}

#[test]
fn files() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let large = write("large", b"");
    std::fs::OpenOptions::new().write(true).open(&large).unwrap().set_len((64 << 20) + 1).unwrap();
    for (path, message, help) in [
        (dir.path().join("none"), "cannot be read: No such file", "write the file"),
        (dir.path().to_owned(), "is a directory", "name the file in it"),
        (fifo, "is not a regular file", "regular file"),
        (large, "is larger than 64 MiB", "shorter prefixes"),
    ] {
        let error = Config::load(&path).expect_err(message);
        let problem = only_error(&error);
        assert_eq!(problem.position(), None);
        assert!(problem.message().contains(message), "{error}");
        assert!(problem.help().contains(help), "{error}");
        assert!(error.to_string().starts_with(&format!("{}: ", path.display())), "{error}");
        assert!(error.render(false).contains(&path.display().to_string()), "{error}");
    }
    let error = Config::load(&write("latin1", b"band = 20000\n# caf\xe9 x\n")).expect_err("not UTF-8");
    let problem = only_error(&error);
    assert_eq!(problem.position(), Some((2, 6)));
    assert!(problem.message().contains("the byte e9 at offset 18"), "{error}");
    // A byte order mark is no column.
    let error = Config::load(&write("bom", b"\xef\xbb\xbfbandd = 1\n")).expect_err("unknown key");
    assert_eq!(only_error(&error).position(), Some((1, 1)));
}
