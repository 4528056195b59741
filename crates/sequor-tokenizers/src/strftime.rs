//! Dates for chat templates: `strftime` in UTC, for the fields that templates
//! use.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// A time of the proleptic Gregorian calendar.
struct Time {
    year: i64,
    /// 1 to 12.
    month: i64,
    day: i64,
    /// 1 to 366.
    day_of_year: i64,
    /// 0 is Sunday.
    weekday: i64,
    second_of_day: i64,
}

impl Time {
    /// From seconds since 1970, by Howard Hinnant's algorithm: years are
    /// counted from March, so that the leap day is the last of its year.
    fn new(unix_seconds: i64) -> Self {
        let days = unix_seconds.div_euclid(86_400);
        let since_0000_03_01 = days + 719_468;
        let era = since_0000_03_01.div_euclid(146_097);
        let day_of_era = since_0000_03_01.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_from_march + 2) / 153;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let leap = i64::from(year % 4 == 0 && (year % 100 != 0 || year % 400 == 0));
        Self {
            year,
            month,
            day: day_from_march - (153 * month_from_march + 2) / 5 + 1,
            day_of_year: if month > 2 {
                day_from_march + 60 + leap
            } else {
                day_from_march - 305
            },
            weekday: (days + 4).rem_euclid(7),
            second_of_day: unix_seconds.rem_euclid(86_400),
        }
    }
}

/// Writes the time by a `strftime` pattern; `Err` is the unknown field.
pub(crate) fn strftime(pattern: &str, unix_seconds: i64) -> Result<String, String> {
    let time = Time::new(unix_seconds);
    let (hour, minute, second) = (
        time.second_of_day / 3600,
        time.second_of_day / 60 % 60,
        time.second_of_day % 60,
    );
    let name = |names: &[&'static str], n: i64| {
        usize::try_from(n)
            .ok()
            .and_then(|n| names.get(n).copied())
            .unwrap_or("")
    };
    let short = |name: &str| name.get(..3).unwrap_or(name).to_owned();
    let month = name(&MONTHS, time.month - 1);
    let weekday = name(&DAYS, time.weekday);

    let mut text = String::new();
    let mut characters = pattern.chars();
    while let Some(c) = characters.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let mut field = characters.next();
        let padded = field != Some('-');
        if !padded {
            field = characters.next();
        }
        let number = |n: i64, width: usize| {
            if padded {
                format!("{n:0width$}")
            } else {
                n.to_string()
            }
        };
        text.push_str(&match field {
            Some('Y') => time.year.to_string(),
            Some('y') => number(time.year.rem_euclid(100), 2),
            Some('m') => number(time.month, 2),
            Some('d') => number(time.day, 2),
            Some('e') => format!("{:2}", time.day),
            Some('j') => number(time.day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('B') => month.to_owned(),
            Some('b' | 'h') => short(month),
            Some('A') => weekday.to_owned(),
            Some('a') => short(weekday),
            Some('w') => time.weekday.to_string(),
            Some('F') => format!("{}-{:02}-{:02}", time.year, time.month, time.day),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => return Err(format!("%{other}")),
            None => return Err("%".to_owned()),
        });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        let all = "%Y-%m-%d %j %a %A %b %B %H:%M:%S %I %p %-d %-m %y %%";
        for (seconds, expected) in [
            (
                0,
                "1970-01-01 001 Thu Thursday Jan January 00:00:00 12 AM 1 1 70 %",
            ),
            (
                951_827_696,
                "2000-02-29 060 Tue Tuesday Feb February 12:34:56 12 PM 29 2 00 %",
            ),
            (
                1_735_689_599,
                "2024-12-31 366 Tue Tuesday Dec December 23:59:59 11 PM 31 12 24 %",
            ),
            (
                -1,
                "1969-12-31 365 Wed Wednesday Dec December 23:59:59 11 PM 31 12 69 %",
            ),
        ] {
            assert_eq!(strftime(all, seconds).unwrap(), expected);
        }
        assert_eq!(strftime("%d %b %Y", 1_700_000_000).unwrap(), "14 Nov 2023");
        assert_eq!(
            strftime("%F %T %e %Z", 1_700_000_000).unwrap(),
            "2023-11-14 22:13:20 14 UTC"
        );
        assert_eq!(strftime("%q", 0).unwrap_err(), "%q");
        assert_eq!(strftime("a%", 0).unwrap_err(), "%");
    }
}
