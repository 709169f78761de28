//! Many short rounds, each with all contestants in another order, so that what the machine does besides hits all alike.

use anyhow::Result;
use fastrand::Rng;

/// Has each of `count` contestants measured once a round. `measure` is told who and yields a value, or `None` for one
/// that is out, who is not asked again. The values of the others, by contestant and round.
///
/// # Errors
/// Those of `measure`.
pub fn interleave(
    count: usize,
    rounds: usize,
    rng: &mut Rng,
    mut measure: impl FnMut(usize) -> Result<Option<f64>>,
) -> Result<Vec<Vec<f64>>> {
    let mut values = vec![Vec::with_capacity(rounds); count];
    let mut order: Vec<usize> = (0..count).collect();
    for _ in 0..rounds {
        rng.shuffle(&mut order);
        let mut out = Vec::new();
        for &contestant in &order {
            match measure(contestant)? {
                Some(value) => values[contestant].push(value),
                None => out.push(contestant),
            }
        }
        order.retain(|contestant| !out.contains(contestant));
        for contestant in out {
            values[contestant].clear();
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_is_asked_once_a_round_in_changing_order() {
        let (mut asked, mut rng) = (Vec::new(), Rng::with_seed(1));
        let values = interleave(4, 50, &mut rng, |who| {
            asked.push(who);
            Ok(Some(who as f64))
        });
        for (who, values) in values.expect("nothing fails").into_iter().enumerate() {
            assert_eq!(values, vec![who as f64; 50]);
        }
        let firsts: Vec<usize> = asked.chunks(4).map(|round| round[0]).collect();
        assert!((0..4).all(|who| firsts.contains(&who)), "{firsts:?}");
    }

    #[test]
    fn who_is_out_has_no_values_and_is_not_asked_again() {
        let mut asked = 0;
        let values = interleave(2, 10, &mut Rng::with_seed(1), |who| {
            asked += who;
            Ok((who == 0 || asked < 3).then_some(1.0))
        });
        assert_eq!(values.expect("nothing fails"), [vec![1.0; 10], vec![]]);
        assert_eq!(asked, 3);
    }
}
